"""Computes a fixed product of matrices: its bits tell whether a host computes as the others do, its processor time how fast it is.

It runs in a process with the job's numeric environment: forked by the fork server, or `python -m elastic.worker.node_check THREADS`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any

import torch

from elastic.memory.tensors import bytes_of
from elastic.settings import fingerprint

_SIZE = 384
_PASSES = 3


def measured(threads: int) -> dict[str, Any]:
    """Returns `product`, a digest of the result, `seconds` of processor time of the fastest pass, and the `fingerprint` of the process."""
    torch.set_num_threads(threads)
    first, second = _matrix(1), _matrix(2)
    digests, seconds = set(), []
    for _ in range(_PASSES):
        began = time.process_time()
        result = torch.softmax(torch.tanh(first @ second), dim=1)
        seconds.append(time.process_time() - began)
        digests.add(hashlib.sha256(bytes_of(result).tobytes()).hexdigest())
    product = digests.pop() if len(digests) == 1 else f"differs from pass to pass ({len(digests)} results of {_PASSES} passes)"
    return {"product": product, "seconds": min(seconds), "fingerprint": fingerprint()}


def _matrix(seed: int) -> torch.Tensor:
    """Returns values between -1 and 1 by integer arithmetic, which is the same everywhere."""
    numbers = torch.arange(_SIZE * _SIZE, dtype=torch.int64)
    mixed = ((numbers + seed * 7919) * 1103515245 + 12345) % (1 << 31)
    return (mixed.to(torch.float32) / float(1 << 30) - 1.0).reshape(_SIZE, _SIZE)


def main() -> None:
    """Prints what is measured; argv is the number of threads."""
    print(json.dumps(measured(int(sys.argv[1]))))


if __name__ == "__main__":
    main()
