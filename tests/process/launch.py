"""Script for process tests that need a separate launcher: `launch.py FUNCTION WORKERS` runs one of `functions`."""

from __future__ import annotations

import json
import sys

import elastic
from tests.process import functions


def fails_in_the_script(job: elastic.Job) -> None:
    job.progress(1, 4)
    if job.worker == 1:
        raise ValueError("a wrong turn")
    functions.PAUSE.wait()


if __name__ == "__main__":
    name, workers = sys.argv[1], int(sys.argv[2])
    result = elastic.run(globals().get(name) or getattr(functions, name), workers=workers)
    print(json.dumps([result.value, result.epoch, result.stopped]))
