"""Starts ranks of a peer as processes with torch's usual variables."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

LIMIT_S = 200


def run_ranks(script: Path, case: dict, folder: Path, ranks: int) -> None:
    """Runs `script CASE.json` as so many ranks; all have ended when it returns. AssertionError with the end of a log if one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_text(json.dumps(case))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            told = {**common, "WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (folder / f"log{rank}").open("wb") as log:
                started.append(subprocess.Popen([sys.executable, str(script), str(folder / "case.json")], env=told, stdout=log, stderr=log))
        ended = [process.wait(LIMIT_S) for process in started]
        assert ended == [0] * ranks, "\n".join((folder / f"log{rank}").read_text()[-2000:] for rank in range(ranks) if ended[rank])
    finally:
        for process in started:
            process.kill()
            process.wait()
