"""One worker under torchrun: DistributedDataParallel on Gloo with a checkpoint after every step. All workers restart when one dies.

    torchrun ... benchmarks/restarted.py '{"batch": 32, "directory": "..."}'

Some choices favour torchrun: only rank 0 writes while the others go on, a step is one micro-batch, and the step number is the only
position in the data.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from commits import CommitLog
from peers import PeerLoader, PeerSettings
from subject import build_model, build_optimizer, cross_entropy
from torch.nn.parallel import DistributedDataParallel

from elastic.host.process import die_with_parent

_TIMEOUT = timedelta(seconds=60)


def train(batch: int, steps: int, directory: Path) -> None:
    """Trains from the newest checkpoint."""
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    share = batch // world
    settings = PeerSettings(kind="ddp", batch=batch, micro_batch=share, steps=steps, cut=())
    load = PeerLoader(settings, range(rank * share, (rank + 1) * share))
    model = build_model()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = build_optimizer(model)
    checkpoint, step = directory / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"] + 1
    attempt_id = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with CommitLog(directory, rank) as log:
        while step < steps:
            tokens, targets = load(step)
            loss = cross_entropy(wrapped(tokens), (tokens, targets))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0:
                _save(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
                log.add(step=step, attempt_id=attempt_id, members=world, loss=loss.item())
            step += 1


def _save(path: Path, state: dict[str, object]) -> None:
    new = path.with_suffix(".new")
    torch.save(state, new)
    new.rename(path)


def main() -> None:
    """Entry of the process: argv is the settings as JSON."""
    die_with_parent(os.getppid())
    given = json.loads(sys.argv[1])
    directory = Path(given["directory"])
    (directory / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    train(given["batch"], given["steps"], directory)


if __name__ == "__main__":
    main()
