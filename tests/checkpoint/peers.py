"""Checkpoints written by torch itself: sharded by FSDP2 on two processes, and unsharded."""

import os
import shutil
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))


def optimizer(module, lr=1e-2):
    wide = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    flat = [parameter for parameter in module.parameters() if parameter.ndim == 1]
    return torch.optim.AdamW([{"params": wide}, {"params": flat, "weight_decay": 0.0}], lr=lr, betas=(0.8, 0.99))


def train(module, optim, step):
    torch.manual_seed(100 + step)
    optim.zero_grad()
    module(torch.randn(4, 5)).square().sum().backward()
    optim.step()


def trained(steps=3):
    module = model()
    optim = optimizer(module)
    for step in range(steps):
        train(module, optim, step)
    return module, optim


def bits(module):
    """Bytes of all parameters."""
    return b"".join(value.detach().contiguous().numpy().tobytes() for value in module.state_dict().values())


def save_plain(path: Path, module, optim, *, flat: bool, **rest):
    states = get_state_dict(module, optim, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    dcp.save({"model": states[0], "optim": states[1], **rest}, checkpoint_id=str(path), no_dist=True)


def load_plain(path: Path, *, flat: bool):
    """A fresh model and optimizer, loaded by torch."""
    module = model(seed=9)
    optim = optimizer(module, lr=77.0)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, states = get_state_dict(module, optim, options=options)
    tree = {"model": weights, "optim": states}
    dcp.load(tree, checkpoint_id=str(path), no_dist=True)
    set_state_dict(module, optim, model_state_dict=tree["model"], optim_state_dict=tree["optim"], options=options)
    return module, optim


def _sharded(rank: int, port: int, root: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    module = model()
    fully_shard(module, mesh=mesh)
    optim = optimizer(module)
    train(module, optim, 0)
    for flat in (False, True):
        states = get_state_dict(module, optim, options=StateDictOptions(flatten_optimizer_state_dict=flat))
        dcp.save({"model": states[0], "optim": states[1], "step": 1}, checkpoint_id=f"{root}/{'flat' if flat else 'nested'}")
    columns = distribute_tensor(torch.arange(35.0).reshape(5, 7), mesh, [Shard(1)])
    dcp.save({"columns": columns}, checkpoint_id=f"{root}/columns")
    whole = get_state_dict(module, optim, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(whole, f"{root}/whole.pt")
    dist.barrier()
    dist.destroy_process_group()


def save_sharded(root: Path) -> None:
    """`nested`, `flat`, `columns` and, gathered by torch, `whole.pt`; by two processes that have ended when it returns."""
    for attempt in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        try:
            mp.spawn(_sharded, (port, str(root)), nprocs=2)
            return
        except (mp.ProcessExitedException, mp.ProcessRaisedException):  # the peer failed: Gloo sometimes aborts, and the port may be taken
            if attempt == 2:
                raise
            for left in root.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
