"""One TorchFT replica group with one worker. When a group dies, the others go on without its share of the samples.

    TORCHFT_LIGHTHOUSE=http://... python benchmarks/replica.py '{"place": 0, "places": 4, "batch": 32, "directory": "...", ...}'

The code follows TorchFT's train_ddp.py, but sets Gloo's timeout. One choice favours TorchFT: a replica's samples are a function of the step
number, so a step that is discarded and retried loses nothing, and a restarted replica needs no position in its data.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from commits import CommitLog
from peers import PeerLoader, PeerSettings
from subject import build_model, build_optimizer, cross_entropy
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo  # pyright: ignore[reportMissingImports]

_HOST = "localhost"


def train(place: int, places: int, batch: int, steps: int, directory: Path, gloo_timeout_s: float) -> None:
    """Trains until `steps` are committed."""
    torch.set_num_threads(1)
    share = batch // places
    load = PeerLoader(
        PeerSettings(kind="ddp", batch=batch, micro_batch=share, steps=steps, cut=()), range(place * share, (place + 1) * share)
    )
    model = build_model()
    inner = build_optimizer(model)

    def state_dict() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": inner.state_dict()}

    def load_state_dict(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=gloo_timeout_s)),
        min_replica_size=1,
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        replica_id=f"place_{place}",
        timeout=timedelta(seconds=30),
        rank=0,
        world_size=1,
        store_addr=_HOST,
        store_port=store.port,
        hostname=_HOST,
    )
    wrapped = DistributedDataParallel(manager, model)
    optimizer = Optimizer(manager, inner)
    with CommitLog(directory, place) as log:
        while (step := manager.current_step()) < steps:
            optimizer.zero_grad()
            tokens, targets = load(step)
            loss = cross_entropy(wrapped(tokens), (tokens, targets))
            loss.backward()
            optimizer.step()
            if manager.current_step() > step and manager.is_participating():
                log.add(step=manager.current_step(), attempt_id=manager._quorum_id, members=manager.num_participants(), loss=loss.item())


def main() -> None:
    """Entry of the process: argv is the settings as JSON."""
    given = json.loads(sys.argv[1])
    train(given["place"], given["places"], given["batch"], given["steps"], Path(given["directory"]), given["gloo_timeout_s"])


if __name__ == "__main__":
    main()
