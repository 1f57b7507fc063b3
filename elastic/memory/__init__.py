"""The only code that allocates or views memory: parameters, gradients, optimizer state, messages, and buffers for files.

`raw` handles bytes of host memory (without torch, since links and rounds import it), `tensors` the memory that layers compute on,
`device` which device that is, `pinned` host memory that a device copies to by itself, `staging` messages on their way between a device
and a link, and `digest` digests contents. On the CPU a tensor
and its bytes on the host share memory; on a device they do not. All other code is written against the contract below.
`tests/test_memory_rule.py` checks that no code bypasses it. `tests/apart.py` removes the sharing on the CPU and checks that results keep
their bits; `tests/fakedevice` is a device that is not the CPU.

**Allocating.** Only `tensors.empty`, `zeros`, `filled`, `zeros_like` and `copy` make memory that layers compute on; only `raw.empty`,
`zeros` and `room` make host memory, and `host_lasting` host memory in the segment. Tensors and messages start at a multiple of
`raw.ALIGNMENT_BYTES`: 64 on the CPU, where kernels take other paths, with other bits, on memory with another alignment; 512 on a device.
Parameters start at multiples of 64 elements of their flat vector, so that runs of aligned vectors are aligned, whatever the dtype.

**Reading (device to host).** `tensors.bytes_of`, `values_of` and `HostBytes.now` return the values at that moment: they wait for earlier
computation. So a copy to the host is synchronous; on the CPU nothing is copied. The bytes are in use until
- `Endpoint.flush` returns, or the receiver is known to have the message, if they were sent;
- the call returns, if they were digested (`digest`, `checksum`) or written to a file.
The tensor must not be written to before that. A device with a separate copy could allow writes earlier; no code may rely on it. The bytes
of `bytes_of` and `now` are read-only: to write, use a `Landing`.

**Writing (host to device).** A `Landing` is a tensor and the bytes through which it is filled. `bytes` belongs to the writer: a link from
`Endpoint.post` until the message was received, the peer dropped or a later attempt installed; a file until the read returns. Until then the
tensor must be neither read nor written to. `Landing.take` ends the writing and returns the tensor. On a device, it copies the bytes up and
makes the computation wait for them; so it is called on the CPU too, where the bytes are the tensor.

**Waiting.** The host waits for a device, never the reverse: no kernel waits for a peer, so closing a socket is enough to give up.
Computation waits for bytes in `take`; links and files wait for computation in `bytes_of`, `values_of`, `now` and `Staged.bytes`. Nothing
else synchronises.

**Staging.** `Staging.down` begins to copy tensors to pinned memory and returns at once; `Staged.bytes` waits for that. `StagedLanding.take`
begins to copy up, and returns at once too: only the computation waits. Its `bytes` may be written to again after `begin`.

**Digests.** They are integer sums, which do not depend on where they are computed: a device can digest its own memory with the same result.
"""
