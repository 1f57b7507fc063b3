"""A program for torchrun: trains an example, that of a plain loop unless EXAMPLE names another one.

`ranked.py FOLDER CHECKPOINT FAULT ...` kills workers, from local rank 0.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from contextlib import nullcontext
from functools import wraps
from pathlib import Path

import elastic
from elastic.chaos.faults import parse
from elastic.chaos.killer import Killer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
example = importlib.import_module(os.environ.get("EXAMPLE", "plain"))


def main(job: elastic.Job, checkpoint: str) -> str | None:
    """The example, with checkpoints if there is a place for them."""
    if not checkpoint:
        return example.main(job)
    prepare = job.prepare

    @wraps(prepare)
    def saved(*given: object, **options: object) -> tuple[object, ...]:
        return prepare(*given, checkpoint=checkpoint, every=10, **options)  # type: ignore[arg-type]

    job.prepare = saved  # type: ignore[method-assign]
    return example.main(job)


if __name__ == "__main__":
    folder, checkpoint, *faults = sys.argv[1:]
    rank, again = os.environ["LOCAL_RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    Path(folder).mkdir(exist_ok=True)
    Path(f"{folder}/rank-{rank}-{again}").write_text(str(os.getpid()))
    with Killer(folder, map(parse, faults)) if rank == "0" and faults else nullcontext() as killer:
        result = elastic.run(main, args=[checkpoint], directory=f"{folder}/run" if not faults else folder)
    missed = 0 if killer is None else len(killer.missed)
    kinds = [incident["kind"] for incident in result.incidents]
    found = {"rank": rank, "again": again, "digest": result.value, "kinds": kinds, "missed": missed}
    sys.stdout.write(f"ranked {json.dumps(found)}\n")  # at once: torchrun makes Python write without a buffer, and ranks share a pipe
