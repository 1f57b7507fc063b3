"""The undisturbed run that a disturbed one is compared with: one worker, no faults; kept by script, arguments, seed, code and processor."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic.chaos import gather
from elastic.chaos.evidence import Reference
from elastic.chaos.observed import STOP, Orders
from elastic.chaos.running import DIGEST_EVERY, OBSERVED
from elastic.chaos.schedule import JobSpec
from elastic.chaos.spawning import environment
from elastic.errors import JobFailed
from elastic.settings import VERSION, best_isa

_LIMIT_S = 3600.0
_FORM = 1


_made_alike: set[tuple[Path, int, tuple[float, ...]]] = set()


def kept_in() -> Path:
    """The folder of kept runs."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "elastic-chaos"
    except RuntimeError:  # a user without a home, as in a container: nothing is kept
        return Path(os.devnull)


def reference(job: JobSpec, steps: int, say: Callable[[str], None] = lambda _: None, *, further: bool = False) -> Reference:
    """Returns the undisturbed run of `steps` steps or more, a kept one if there is one. Raises JobFailed if it cannot be made.

    With `further` it tells whether the script ends by itself after these steps: it is `whole` then, or has more steps.
    """
    kept = read(path_of(job))
    if kept is not None and len(kept.losses) >= steps and steps in kept.digests and (not further or kept.whole or len(kept.losses) > steps):
        return kept
    say(f"the undisturbed run of {steps} steps is made (and kept for other runs of this script)")
    return _keep(job, _made(job, steps + further), say)


def made_again(job: JobSpec, steps: int, known: Reference) -> Reference:
    """Makes the run again: is the script repeatable, and if so, is the kept run still what it does (it may read files that have changed)?

    Returns the known run if the new one is the same; else the new one if it is repeatable; else the known one, with `repeatable` False.
    One process makes it again once: when a schedule is shrunk, many runs differ.
    """
    asked = (path_of(job), steps, known.losses)
    if asked in _made_alike:
        return known
    limit = steps + (known.whole or len(known.losses) > steps)  # so that it is known again whether the script has more steps
    again = _made(job, limit)
    if _same(again, known, steps):
        _made_alike.add(asked)
        return known
    if _same(again, _made(job, limit), steps):
        return _keep(job, again, lambda _: None)
    return replace(known, repeatable=False)


def _same(one: Reference, other: Reference, steps: int) -> bool:
    return (one.losses[:steps], one.digests.get(steps)) == (other.losses[:steps], other.digests.get(steps))


def path_of(job: JobSpec) -> Path:
    """Returns the file of the kept run."""
    return kept_in() / f"{key_of(job)}.json"


def _keep(job: JobSpec, made: Reference, say: Callable[[str], None]) -> Reference:
    """Keeps a run, if there is a place for it: a home that is missing, full or not ours does not make the run worse."""
    path = path_of(job)
    new = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps({"form": _FORM, **_to_json(made)}))
        new.rename(path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        say(f"the undisturbed run cannot be kept in {path.parent} ({error.strerror}), and is made again next time: set XDG_CACHE_HOME")
    return made


def key_of(job: JobSpec) -> str:
    """What the bits of an undisturbed run follow from."""
    import torch

    where = job.script.rpartition(":")[0]
    script = Path(where).read_bytes() if where.endswith(".py") else b""
    about = [_FORM, job.script, list(job.args), job.job_seed, best_isa(), str(torch.__version__), VERSION]
    return hashlib.sha256(json.dumps(about).encode() + script + _code()).hexdigest()[:32]


def _code() -> bytes:
    """A digest of the runtime's own code: a change of it may change bits."""
    found = hashlib.sha256()
    package = Path(__file__).parents[1]
    for folder in (package, package / "checkpoint", package / "snapshot"):
        for path in sorted(folder.rglob("*.py")):
            if "chaos" not in path.parts or path.name == "built_in.py":
                found.update(path.read_bytes())
    return found.digest()


def read(path: Path) -> Reference | None:
    """Reads a kept run; None if there is none, or if the file is something else."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or data.get("form") != _FORM:
        return None
    try:
        digests = {int(step): digest for step, digest in data["digests"].items()}
        losses, norms = (tuple(map(float, data[name])) for name in ("losses", "grad_norms"))
        return Reference(losses=losses, grad_norms=norms, digests=digests, exact=data["exact"], whole=data.get("whole", False))
    except (KeyError, TypeError, ValueError, AttributeError):  # another file, such as a report
        return None


def _to_json(known: Reference) -> dict[str, Any]:
    return {"losses": known.losses, "grad_norms": known.grad_norms, "digests": known.digests, "exact": known.exact, "whole": known.whole}


def _made(job: JobSpec, steps: int) -> Reference:
    folder = Path(tempfile.mkdtemp(prefix="elastic-chaos-calm-"))
    try:
        (folder / "observed").mkdir()
        (folder / "tmp").mkdir()
        (folder / "observed" / STOP).write_text(str(steps))
        written, saves = str(folder / "observed"), str(folder / "checkpoints")
        orders = json.dumps(Orders(folder=written, script=job.script, args=job.args, checkpoint=saves, digest_every=DIGEST_EVERY).to_json())
        words = ["run", "--workers", "1", "--seed", str(job.job_seed), "--directory", str(folder / "run"), OBSERVED, orders]
        command = [sys.executable, "-m", "elastic.cli.main", *words]
        used = environment(TMPDIR=str(folder / "tmp"))
        ended = subprocess.run(command, check=False, capture_output=True, text=True, env=used, timeout=_LIMIT_S)
        if ended.returncode:
            raise JobFailed(
                f"the undisturbed run failed with exit code {ended.returncode}, so the script fails without faults: {ended.stderr[-1500:]}"
            )
        found = gather.worker_notes(folder / "observed")
        if len(found) != 1:
            raise JobFailed("the undisturbed run ended without a trainer: the script must train with an elastic.Trainer")
        (notes,) = found
    finally:
        gather.remove(folder, folder / "tmp")
    return Reference(
        losses=tuple(each.loss for each in notes.given),
        grad_norms=tuple(each.grad_norm for each in notes.given),
        digests=notes.digests,
        exact=notes.exact,
        whole=len(notes.given) < steps,
    )
