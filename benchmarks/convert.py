"""Times the conversion of DeepSpeed's ZeRO checkpoints to Universal: by our converter and by DeepSpeed's `ds_to_universal`.

The real DeepSpeed makes the checkpoint (two ranks on the CPU, AdamW, two groups). The two sides then convert it alternately, each in a new
process, to the same disk. The time of a round is that of the process, including imports; the time of the imports alone is also measured.
Our converter syncs its output and by default reads both checkpoints again and compares every bit; DeepSpeed's does neither. The benchmark
compares the two outputs. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import write_json

from elastic.checkpoint.convert.compare import compare
from elastic.checkpoint.convert.run import open_any
from elastic.checkpoint.state import PARAM
from tests.checkpoint.launch import run_ranks

_PEER = Path(__file__).resolve().parents[1] / "tests" / "checkpoint" / "deepspeed_peer.py"
_LIMIT_S = 900
_PEAK = "; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
_OURS = (
    "import sys; from pathlib import Path; from checkpoint.convert.run import Request, convert; "
    "convert(Request(source=Path(sys.argv[1]), target=Path(sys.argv[2]), to='deepspeed-universal', verify=sys.argv[3] == 'verify'))"
)
_DEEPSPEED = (
    "import sys; from types import SimpleNamespace; from deepspeed.checkpoint.ds_to_universal import main; "
    "main(SimpleNamespace(input_folder=sys.argv[1], output_folder=sys.argv[2], num_extract_workers=int(sys.argv[3]), "
    "num_merge_workers=int(sys.argv[3]), keep_temp_folder=False, strict=True, inject_missing_state=True))"
)
_IMPORTS = {
    "elastic": "import elastic.checkpoint.convert.run, elastic.checkpoint.convert.deepspeed",
    "deepspeed": "import deepspeed.checkpoint.ds_to_universal",
}


def _timed(code: str, arguments: list[str]) -> tuple[float, int]:
    """Returns the seconds of a process that runs `code`, and its peak memory in KiB."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-c", code + _PEAK, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=_LIMIT_S)
    return time.perf_counter() - began, int(done.stdout.split()[-1])


def _sides(source: Path, root: Path) -> dict[str, tuple[str, list[str]]]:
    """Returns code and arguments of each side, by name."""
    tag = next(path for path in source.iterdir() if path.is_dir())
    return {
        "elastic": (_OURS, [str(source), str(root / "elastic"), "verify"]),
        "elastic, not verified": (_OURS, [str(source), str(root / "elastic, not verified"), "no"]),
        "deepspeed, 1 worker": (_DEEPSPEED, [str(tag), str(root / "deepspeed, 1 worker"), "1"]),
        "deepspeed, 2 workers": (_DEEPSPEED, [str(tag), str(root / "deepspeed, 2 workers"), "2"]),
    }


def _checked(first: Path, second: Path) -> int:
    """Returns the number of tensors that both outputs hold with the same bits. Raises RuntimeError if one differs."""
    (_, left), (_, right) = open_any(first), open_any(second, trust_pickle=True)
    tensors = {name if state == PARAM else f"{name} {state}" for name, states in left.contents.tensors.items() for state in states}
    found = [difference for difference in compare(left, right, limit=4 << 20) if difference.what in tensors]
    left.close()
    right.close()
    if not found or not all(difference.equal for difference in found):
        raise RuntimeError(f"the two conversions differ: {[difference for difference in found if not difference.equal][:3]}")
    return len(found)


def measure(source: Path, rounds: int) -> dict[str, Any]:
    """Returns the medians of each side over the rounds."""
    times: dict[str, list[tuple[float, int]]] = {}
    compared = 0
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        for _ in range(rounds):
            for name, (code, arguments) in _sides(source, Path(scratch)).items():
                times.setdefault(name, []).append(_timed(code, arguments))
            compared = _checked(Path(scratch) / "elastic", Path(scratch) / "deepspeed, 1 worker")
            for path in Path(scratch).iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = {
        name: {
            "median_s": statistics.median(seconds for seconds, _ in runs),
            "all_s": [seconds for seconds, _ in runs],
            "peak_mib": max(peak for _, peak in runs) >> 10,
        }
        for name, runs in times.items()
    }
    imports = {name: statistics.median(_timed(code, [])[0] for _ in range(3)) for name, code in _IMPORTS.items()}
    return {"sides": found, "imports_s": imports, "states_compared": compared}


def main() -> None:
    """Makes the checkpoint, measures and prints the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        case = {"stage": options.stage, "width": options.width, "layers": options.layers, "vocab": 512, "tied": False, "frozen": False}
        run_ranks(_PEER, {**case, "steps": 1, "save_at": 1, "save": str(root / "zero"), "record": str(root / "record.pt")}, root / "run", 2)
        (root / "record.pt").unlink()
        size = sum(path.stat().st_size for path in (root / "zero").rglob("*") if path.is_file())
        for path in (root / "zero").glob("*.py"):
            path.unlink()
        figures = {
            "bytes": size,
            "width": options.width,
            "layers": options.layers,
            "stage": options.stage,
            **measure(root / "zero", options.rounds),
        }
    print(json.dumps(figures, indent=2))
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
