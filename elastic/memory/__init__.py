"""The only code that allocates or views memory: parameters, gradients, optimizer state, messages, and what files are read into.

`raw` is bytes of the host (no torch: links and rounds import it), `tensors` is what layers compute on, `digest` proves contents. There is
one implementation, the CPU's, where a tensor's memory and its bytes on the host are the same memory. All other code is written against the
contract below, so that another device is a change of this package alone. `tests/test_memory_rule.py` checks that nobody goes around it,
`tests/apart.py` takes the sharing away, and the bits must stay.

**Allocating.** Only `tensors.empty`, `zeros`, `filled`, `zeros_like` and `copy` make memory that layers compute on; only `raw.empty`,
`zeros` and `room` make memory of the host. Tensors and messages start at a multiple of `raw.ALIGNMENT_BYTES`: 64 on the CPU, where kernels
take other paths, with other bits, on memory that starts elsewhere; a device needs 256, or 512 where it is exact. Parameters start at
multiples of 64 elements of their flat vector, so that runs of aligned vectors are aligned, whatever the dtype.

**Reading (device to host).** `tensors.bytes_of`, `values_of` and `HostBytes.now` return the values as they are at that moment: everything
that was computed before has been waited for. So a copy to the host is synchronous, and here it is no copy. Whoever got the bytes reads
them until
- `Endpoint.flush` returns, or the receiver is known to have the message, if they were sent;
- the call returns, if they were digested (`digest`, `checksum`) or written to a file.
The tensor must not be written to before that. A device with a copy of its own could allow it earlier; nobody may rely on it. The bytes of
`bytes_of` and `now` are read-only: who wants to write uses a `Landing`.

**Writing (host to device).** A `Landing` is a tensor with the bytes that it is filled through. `bytes` belongs to whoever fills it (a link
from `Endpoint.post` until the message was received, the peer dropped or a later attempt installed; a file until the read returns); the
tensor must be neither read nor written to meanwhile. `Landing.take` ends that and returns the tensor. On a device, it is what copies the
bytes up and makes the computation wait for them, so it is called on the CPU too, where the bytes are the tensor.

**Waiting.** The host waits for a device, never the other way: no kernel waits for a peer, so giving up is closing a socket. Computation
waits for bytes in `take`; links and files wait for computation in `bytes_of`, `values_of` and `now`. No other code synchronises.

**Digests.** They are integer sums, equal wherever they are computed: a device digests its own memory and gives the same digits.
"""
