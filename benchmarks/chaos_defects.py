"""Shows that the chaos harness finds defects: each is made in a copy of the runtime, which gets faults that the sound runtime survives.

    python benchmarks/chaos_defects.py --json build/chaos_defects.json          # all, and the sound copy under the same faults
    python benchmarks/chaos_defects.py --defect "a micro-batch dropped"

The exit code is 1 if a defect is not found, or by no oracle of those that should name it, or if the sound copy does not pass.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from report import write_json
from rich.console import Console
from rich.table import Table

_ROOT = Path(__file__).resolve().parents[1]
_TRAIN = Path(__file__).resolve().parent / "chaos_train.py"
_PACKAGES = ("elastic", "checkpoint", "snapshot")
_STEPS, _LIMIT_S = 40, 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """A defect: in `file`, `old` becomes `new`. Faults show it, on so many hosts, and one of these oracles must fail."""

    name: str
    file: str
    old: str
    new: str
    faults: tuple[str, ...]
    oracles: frozenset[str]
    hosts: int = 1


_NUMBERS = frozenset({"losses", "digest", "agreement"})
DEFECTS = (
    Defect(
        name="a replica skipped",
        file="snapshot/replication.py",
        old="        self._optimizer.replay(gradients, self._settings[step]",
        new="        gradients.pop(next(iter(gradients)))\n        self._optimizer.replay(gradients, self._settings[step]",
        faults=("host-loss@20 host=1 settled=1",),
        oracles=_NUMBERS | {"blame", "ended"},
        hosts=2,
    ),
    Defect(
        name="a stale epoch accepted",
        file="elastic/comm/mailbox.py",
        old="            self._slots = {key: queue for key, queue in self._slots.items() if key[0] >= attempt_id}\n",
        new="            self._slots = {(max(key[0], attempt_id), *key[1:]): queue for key, queue in self._slots.items()}\n",
        faults=("kill@10:backward place=1", "kill@20:reduce", "kill@30:ready place=2"),
        oracles=_NUMBERS | {"ended", "blame", "stalls"},
    ),
    Defect(
        name="a micro-batch dropped",
        file="elastic/engine/reducer.py",
        old="        self._folds[vector.id].add(grain, [None if gradient",
        new="        gradients = [None] * len(gradients) if self._step % 9 == 5 and grain == 3 else gradients\n"
        "        self._folds[vector.id].add(grain, [None if gradient",
        faults=("kill@10 place=1",),
        oracles=_NUMBERS,
    ),
    Defect(
        name="a randomness key used twice",
        file="elastic/engine/stage.py",
        old="        self._generators.enter(*(key or self.key(step, micro_batch)))",
        new="        self._generators.enter(*(key or self.key(step, micro_batch - micro_batch % 2)))",
        faults=("kill@10 place=1",),
        oracles=_NUMBERS,
    ),
    Defect(
        name="an update applied twice",
        file="elastic/worker/runtime.py",
        old="        self.engine.update(answer)\n",
        new="        self.engine.update(answer)\n"
        "        if self.engine.view.epoch > 1 and answer.step % 7 == 0:\n            self.engine.update(answer)\n",
        faults=("kill@10 place=1",),
        oracles=_NUMBERS,
    ),
    Defect(
        name="a header marked before its contents",
        file="elastic/worker/engine.py",
        old="        self._contents.updates()\n",
        new="        self._contents.updates()\n        self._contents.updated(answer.step)\n",
        faults=tuple(f"kill@{step}:apply place={step % 3}" for step in range(6, 38, 6)),
        oracles=_NUMBERS,
    ),
)


@contextmanager
def copied(defect: Defect | None) -> Iterator[Path]:
    """A copy of the runtime, with a defect. Raises SystemExit if the line is not there exactly once."""
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        folder = Path(name)
        for package in _PACKAGES:
            shutil.copytree(_ROOT / package, folder / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        if defect is not None:
            path = folder / defect.file
            text = path.read_text()
            if text.count(defect.old) != 1:
                raise SystemExit(f"{defect.name}: {defect.file} has this {text.count(defect.old)} times: {defect.old.strip()}")
            path.write_text(text.replace(defect.old, defect.new))
        yield folder


def ran(defect: Defect | None, faults: tuple[str, ...], hosts: int, workers: int, kept: Path) -> dict[str, Any]:
    """Runs these faults with a copy of the runtime, and returns the report. The undisturbed run is the sound runtime's."""
    with copied(defect) as folder:
        environment = {**os.environ, "PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
        _take_over(folder, environment, kept)
        flags = [text for fault in faults for text in ("--fault", fault)]
        words = ["chaos", "run", "--script", f"{_TRAIN}:train", "--arg", str(_STEPS), "--workers", str(workers), "--hosts", str(hosts)]
        words += ["--minutes", "3", "--json", str(folder / "r.json"), *flags]
        command = [sys.executable, "-m", "elastic.cli.main", *words]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=folder, timeout=_LIMIT_S)
        if not (folder / "r.json").exists():
            raise SystemExit(f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}")
        return json.loads((folder / "r.json").read_text())


_KEY = (
    "from elastic.chaos import reference, schedule; import sys, json; job = schedule.JobSpec(script=sys.argv[1], args=[int(sys.argv[2])]); "
)
_KEY_OF = _KEY + "print(reference.key_of(job))"
_MAKE = _KEY + "reference.reference(job, int(sys.argv[2]))"


def _take_over(folder: Path, environment: dict[str, str], kept: Path) -> None:
    """Makes the undisturbed run with the sound runtime, and puts it where the copy keeps its own."""
    sound = {**os.environ, "PYTHONPATH": str(_ROOT), "XDG_CACHE_HOME": str(kept)}
    words = [f"{_TRAIN}:train", str(_STEPS)]
    subprocess.run([sys.executable, "-c", _MAKE, *words], check=True, env=sound, cwd=_ROOT)
    (made,) = (kept / "elastic-chaos").glob("*.json")
    key = subprocess.run([sys.executable, "-c", _KEY_OF, *words], check=True, env=environment, cwd=folder, capture_output=True, text=True)
    place = folder / "cache" / "elastic-chaos" / f"{key.stdout.strip()}.json"
    place.parent.mkdir(parents=True)
    shutil.copy(made, place)


def row(name: str, report: dict[str, Any], wanted: frozenset[str] | None) -> dict[str, Any]:
    """One line of the table; `found` says whether it is as it should be."""
    failed = {each["oracle"]: each["reason"] for each in report["findings"] if each["verdict"] == "fail"}
    found = report["verdict"] == "pass" if wanted is None else bool(wanted & set(failed))
    said = next(iter(failed.values()), "; ".join(report["reasons"]))
    return {"defect": name, "verdict": report["verdict"], "oracles": sorted(failed), "said": said, "found": found}


def main(
    defect: Annotated[list[str] | None, typer.Option(help="Only this one. Repeatable.")] = None,
    sound: Annotated[bool, typer.Option(help="Also run the sound copy under the faults of each.")] = True,
    path: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Runs all defects, and prints a table."""
    chosen = [each for each in DEFECTS if defect is None or each.name in defect]
    if not chosen:
        raise typer.BadParameter(f"use one of {', '.join(each.name for each in DEFECTS)}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        for each in chosen:
            workers = 2 if each.hosts > 1 else 3
            if sound:
                rows.append(row(f"none ({', '.join(each.faults)})", ran(None, each.faults, each.hosts, workers, Path(name)), None))
            rows.append(row(each.name, ran(each, each.faults, each.hosts, workers, Path(name)), each.oracles))
            for line in rows[-2:] if sound else rows[-1:]:
                print(json.dumps(line), flush=True)
    table = Table("defect", "verdict", "named by", "what was said", "as it should be")
    for line in rows:
        table.add_row(line["defect"], line["verdict"], ", ".join(line["oracles"]), line["said"][:200], "yes" if line["found"] else "NO")
    Console().print(table)
    write_json(path, rows)
    raise typer.Exit(0 if all(line["found"] for line in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
