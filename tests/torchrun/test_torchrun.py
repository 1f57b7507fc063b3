"""Two real torchruns, as on two hosts, that meet through etcd."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from tests.etcd_cluster import Cluster

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("all_reduce.py")

pytestmark = pytest.mark.long


@pytest.fixture
def plugged(tmp_path: Path) -> str:
    """A path with the entry point that the project declares, as an installed package has it."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torchrun.handlers"]
    info = tmp_path / "declared-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[torchrun.handlers]\n" + "".join(f"{name} = {target}\n" for name, target in declared.items()))
    return f"{tmp_path}{os.pathsep}{ROOT}"


def test_two_torchruns_meet_and_start_again_after_a_death(etcd: Cluster, plugged: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--max-restarts=1",
        "--monitor-interval=0.2",
    ]
    meet = [f"--rdzv-id={uuid4().hex}", "--rdzv-backend=etcd-v3", f"--rdzv-endpoint={etcd.addresses}", "--rdzv-conf=last_call_timeout=1"]
    local = ["--local-addr=127.0.0.1", str(PROGRAM), str(tmp_path / "died")]
    started = [
        subprocess.Popen(
            [*command, *meet, *local],
            env=os.environ | {"PYTHONPATH": plugged},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        said = [each.communicate(timeout=150) for each in started]
    finally:
        for each in started:
            each.kill()
    assert [each.returncode for each in started] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    lines = [line for out, _ in said for line in out.splitlines() if line.startswith("again")]
    assert sorted(lines) == [f"again {again} rank {rank} of 2 sum 3" for again in (False, True) for rank in (0, 1)]
