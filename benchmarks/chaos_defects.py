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

from elastic.chaos import reference
from elastic.chaos.schedule import JobSpec

_ROOT = Path(__file__).resolve().parents[1]
_TRAIN = Path(__file__).resolve().parent / "chaos_train.py"
_PACKAGES = ("elastic", "checkpoint", "snapshot")
_STEPS, _LIMIT_S = 40, 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """A defect: in files, old lines become new ones. Faults show it, on so many hosts, and one of these oracles must fail.

    One that only a kill at the right moment shows gets several `tries`; the table says how many it took.
    """

    name: str
    changes: tuple[tuple[str, str, str], ...]
    faults: tuple[str, ...]
    oracles: frozenset[str]
    hosts: int = 1
    tries: int = 1


_NUMBERS = frozenset({"losses", "digest", "agreement"})
DEFECTS = (
    Defect(
        name="a replica skipped",
        changes=(
            (
                "snapshot/replication.py",
                "        self._optimizer.replay(gradients, self._settings[step]",
                "        gradients.pop(next(iter(gradients)))\n        self._optimizer.replay(gradients, self._settings[step]",
            ),
        ),
        faults=("host-loss@20 host=1 settled=1",),
        oracles=_NUMBERS | {"blame", "ended"},
        hosts=2,
    ),
    Defect(
        name="a stale epoch accepted",
        changes=(
            ("elastic/recovery/proposal.py", "epoch=last.epoch + 1, attempt", "epoch=last.epoch, attempt"),
            ("elastic/recovery/gate.py", "    if view.epoch != last.epoch + 1:", "    if view.epoch < last.epoch:"),
        ),
        faults=("kill@10:backward place=1", "kill@20:reduce", "kill@30:ready place=2"),
        oracles=frozenset({"one history", "ended"}),
    ),
    Defect(
        name="a micro-batch dropped",
        changes=(
            (
                "elastic/engine/reducer.py",
                "        self._folds[vector.id].add(grain, [None if gradient",
                "        gradients = [None] * len(gradients) if self._step % 9 == 5 and grain == 3 else gradients\n"
                "        self._folds[vector.id].add(grain, [None if gradient",
            ),
        ),
        faults=("kill@10 place=1",),
        oracles=_NUMBERS,
    ),
    Defect(
        name="a randomness key used twice",
        changes=(
            (
                "elastic/engine/stage.py",
                "        self._generators.enter(*(key or self.key(step, micro_batch)))",
                "        self._generators.enter(*(key or self.key(step, micro_batch - micro_batch % 2)))",
            ),
        ),
        faults=("kill@10 place=1",),
        oracles=_NUMBERS,
    ),
    Defect(
        name="an update applied twice",
        changes=(
            (
                "elastic/worker/runtime.py",
                "        self.engine.update(answer)\n",
                "        self.engine.update(answer)\n"
                "        if self.engine.view.epoch > 1 and answer.step % 7 == 0:\n            self.engine.update(answer)\n",
            ),
        ),
        faults=("kill@10 place=1",),
        oracles=_NUMBERS,
    ),
    Defect(
        name="a header marked before its contents",
        changes=(
            (
                "elastic/worker/engine.py",
                "        self._contents.updates()\n",
                "        self._contents.updates()\n        self._contents.updated(answer.step)\n",
            ),
        ),
        faults=tuple(f"kill@{step}:apply place={step % 3}" for step in range(6, 38, 6)),
        oracles=_NUMBERS,
        tries=4,
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
            for file, old, new in defect.changes:
                text = (folder / file).read_text()
                if text.count(old) != 1:
                    raise SystemExit(f"{defect.name}: {file} has this {text.count(old)} times: {old.strip()}")
                (folder / file).write_text(text.replace(old, new))
        yield folder


def ran(defect: Defect | None, faults: tuple[str, ...], hosts: int, workers: int, calm: Path) -> dict[str, Any]:
    """Runs these faults with a copy of the runtime, and returns the report. The undisturbed run is the sound runtime's."""
    with copied(defect) as folder:
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        flags = [text for fault in faults for text in ("--fault", fault)]
        words = ["chaos", "run", "--script", f"{_TRAIN}:train", "--arg", str(_STEPS), "--workers", str(workers), "--hosts", str(hosts)]
        words += ["--patience", "40", "--minutes", "3", "--json", str(folder / "r.json"), "--reference", str(calm), *flags]
        command = [sys.executable, "-m", "elastic.cli.main", *words]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=folder, timeout=_LIMIT_S)
        if not (folder / "r.json").exists():
            raise SystemExit(f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}")
        return json.loads((folder / "r.json").read_text())


def undisturbed(folder: Path) -> Path:
    """Makes the undisturbed run with the sound runtime; returns its file."""
    os.environ["XDG_CACHE_HOME"] = str(folder)
    job = JobSpec(script=f"{_TRAIN}:train", args=(_STEPS,))
    reference.reference(job, _STEPS, further=True)
    return reference.path_of(job)


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
        calm = undisturbed(Path(name))
        for each in chosen:
            workers = 2 if each.hosts > 1 else 3
            if sound:
                rows.append(row(f"none ({', '.join(each.faults)})", ran(None, each.faults, each.hosts, workers, calm), None))
            tried = list[dict[str, Any]]()
            while len(tried) < each.tries and not (tried and tried[-1]["found"]):
                tried.append(row(each.name, ran(each, each.faults, each.hosts, workers, calm), each.oracles))
            rows.append({**tried[-1], "tries": len(tried)})
            for line in rows[-2:] if sound else rows[-1:]:
                print(json.dumps(line), flush=True)
    table = Table("defect", "verdict", "named by", "what was said", "tries", "as it should be")
    for line in rows:
        table.add_row(
            line["defect"],
            line["verdict"],
            ", ".join(line["oracles"]),
            line["said"][:200],
            str(line.get("tries", 1)),
            "yes" if line["found"] else "NO",
        )
    Console().print(table)
    write_json(path, rows)
    raise typer.Exit(0 if all(line["found"] for line in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
