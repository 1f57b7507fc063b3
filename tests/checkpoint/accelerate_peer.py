"""One rank of FSDP2 on the CPU. Accelerate's functions save its state in shards, and torch gathers the optimizer state for comparison.

Run as `python accelerate_peer.py CASE.json` with torch's usual RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Not imported by tests.
`Accelerator` accepts FSDP only on accelerators. So the functions that its `save_state` calls are called directly: `save_fsdp_model` and
`save_fsdp_optimizer`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main() -> None:
    """Two steps, then both files."""
    case = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False)
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
    save_fsdp_model(plugin, accelerator, model, case["save"])
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, case["save"])
    whole = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if accelerator.is_main_process:
        torch.save(whole, case["record"])
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries sometimes abort the process at a normal exit
