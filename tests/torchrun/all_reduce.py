"""A program for torchrun: sums ranks over all processes. The first time the last rank dies after that, so torchrun starts all again.

Its argument is a file, which the rank that dies makes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

died = Path(sys.argv[1])
again = died.exists()
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
print(f"again {again} rank {dist.get_rank()} of {dist.get_world_size()} sum {int(total)}", flush=True)
dist.barrier()
if not again and dist.get_rank() == dist.get_world_size() - 1:
    died.touch()
    os._exit(3)
dist.barrier()
dist.destroy_process_group()
