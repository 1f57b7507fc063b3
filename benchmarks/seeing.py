"""Measures what it costs to see a job.

    python benchmarks/seeing.py cost --rounds 5 --json build/seeing.json     # metrics, events, trace and report of a job that trains
    python benchmarks/seeing.py top                                          # `elastic top` of a job with 200 workers
    python benchmarks/seeing.py start                                        # `elastic --help`, and `import elastic` besides torch

- cost: pairs of jobs, one after the other, of the GPT of `throughput.py`. One answers Prometheus, which asks every second, keeps its
  events, and writes a trace and a report. The other one does none of this, and its agent writes no events, no steps and no state either,
  which every other job does. The ratio is that of the medians of their steps; what is written behind the last step is told apart.
- top: the job of `control_plane.py`, with real agents and played workers; a real `elastic top` process on a terminal of its own, by its run
  directory and by etcd. Its processor seconds, and those of the process that asks for it, as a share of one core.
- start: processor seconds and wall-clock seconds of the command; the time that `import elastic` takes behind `import torch`. Least of all.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from control_model import Shape
from control_plane import SECRET, etcd, hosts, processor_seconds, start
from measure import SEQ, Measurement, Task, free_port, run_ours
from report import write_json

from elastic.chaos.hosts import children_of
from elastic.host.rundir import RunDirectory

QUIET = """
import sys
if any("elastic.agent.main" in each for each in sys.orig_argv):
    from elastic.agent import live
    from elastic.agent.record import JobRecord
    from elastic.observe.journal import Journal
    from elastic.observe.step_log import StepLog
    live.standing = lambda coordinator: {}
    JobRecord.live = Journal.keep = StepLog._write = lambda self, *arguments: None
"""
"""What the agent of a job that nobody looks at does not do."""

ROWS, COLUMNS = 50, 160
app = typer.Typer(add_completion=False)
Path_ = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]


@contextmanager
def unseen(folder: Path) -> Iterator[None]:
    """Makes agents that are started meanwhile write nothing."""
    (folder / "sitecustomize.py").write_text(QUIET)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), str(Path(__file__).parents[1]), before]))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@contextmanager
def asked(port: int, counts: list[int]) -> Iterator[None]:
    """Asks for metrics once a second, as Prometheus does at most; `counts` gets the number of answered values of each time."""
    over = threading.Event()

    def ask() -> None:
        while not over.wait(1.0):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1.0) as answer:
                counts.append(sum(not line.startswith(b"#") for line in answer))

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield
    finally:
        over.set()
        asker.join()


def seen_job(task: Task, folder: Path) -> tuple[Measurement, dict[str, Any]]:
    """Runs a job that is seen in every way. Returns its times, and what was seen."""
    port, counts = free_port(), list[int]()
    trace, page = folder / "trace.json", folder / "report.html"
    with asked(port, counts):
        found = run_ours(task, directory=folder / "run", metrics_port=port, trace=trace, report=page, progress=False)
        ended = time.monotonic()
    sizes = {path.name: path.stat().st_size for path in (trace, page, *(folder / "run").glob("*.jsonl"))}
    if not counts or min(sizes.values()) == 0:
        raise SystemExit(f"the job was not seen: {len(counts)} answers of metrics, {sizes}")
    return found, {"answers": len(counts), "values": max(counts), "bytes": sizes, "end_s": ended - found.last_at}


def unseen_job(task: Task, folder: Path) -> tuple[Measurement, float]:
    """Runs a job that nobody can see. Returns its times, and the seconds between its last step and its end."""
    with unseen(folder):
        found = run_ours(task, directory=folder / "run", progress=False)
        ended = time.monotonic()
    if written := [path.name for path in (folder / "run").iterdir() if path.name in ("events.jsonl", "steps.jsonl")]:
        raise SystemExit(f"this job was to write nothing, and has written {written}")
    return found, ended - found.last_at


@app.command()
def cost(
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of jobs.")] = 5,
    steps: Annotated[int, typer.Option(min=3, help="Timed steps of a job.")] = 40,
    warm_up: Annotated[int, typer.Option(min=1, help="Untimed steps before them.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Workers.")] = 2,
    stages: Annotated[int, typer.Option(min=1, help="Stages.")] = 2,
    tokens: Annotated[int, typer.Option(min=512, help="Tokens a step.")] = 1024,
    path: Path_ = None,
) -> None:
    """Prints the ratio of step times with and without metrics, events, trace and report."""
    task = Task(workers=workers, stages=stages, batch=tokens // SEQ, micro_batch=min(4, tokens // SEQ // 4), warm_up=warm_up, steps=steps)
    pairs = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="elastic-bench-") as one, tempfile.TemporaryDirectory(prefix="elastic-bench-") as other:
            runs: dict[str, Any] = {}
            for seen in (number % 2 == 0, number % 2 != 0):  # each is the first one as often
                runs["seen" if seen else "unseen"] = seen_job(task, Path(one)) if seen else unseen_job(task, Path(other))
        (with_it, told), (without, end_s) = runs["seen"], runs["unseen"]
        ratio = with_it.median_s / without.median_s
        pairs.append({"ratio": ratio, "seen": with_it.to_json(), "unseen": without.to_json(), "told": told, "unseen_end_s": end_s})
        print(f"round {number + 1}: {with_it.median_s:.4f} and {without.median_s:.4f} s a step, ratio {ratio:.4f}; "
              f"behind the last step {told['end_s']:.2f} and {end_s:.2f} s", file=sys.stderr)  # fmt: skip
    ratios = [pair["ratio"] for pair in pairs]
    figures = {"ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}, "load": os.getloadavg()[0]}
    print(json.dumps(figures))
    write_json(path, {**figures, "workers": workers, "stages": stages, "tokens": tokens, "pairs": pairs})


def used(pid: int) -> float:
    """Returns the processor seconds of a process and of its children that live."""
    return sum(processor_seconds(each) for each in (pid, *children_of(pid)))


def watched(words: list[str], seconds: float, settle: float) -> dict[str, Any]:
    """Runs `elastic top` on a terminal for so long, and returns what it took and the lines it showed last. Raises SystemExit if it ends."""
    parent, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "elastic.cli.main", "top", *words]
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    shown = bytearray()
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True)
    os.close(terminal)

    def read() -> None:
        with suppress(OSError):  # the terminal is closed
            while part := os.read(parent, 1 << 16):
                shown.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        time.sleep(settle)
        began, before, first = time.monotonic(), used(process.pid), len(shown)
        time.sleep(seconds)
        spent, lasted = used(process.pid) - before, time.monotonic() - began
        if process.poll() is not None:
            raise SystemExit(f"elastic top has ended: {bytes(shown[-2000:]).decode(errors='replace')}")
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(parent)
    frames = bytes(shown[first:]).count(b"hosts: ")
    if frames < seconds / 2 or b"more" not in shown:
        raise SystemExit(f"elastic top has shown {frames} tables in {lasted:.0f} s: {bytes(shown[-2000:]).decode(errors='replace')}")
    return {"share": spent / lasted, "tables": frames, "seconds": lasted, "bytes": len(shown) - first}


@app.command()
def top(
    count: Annotated[int, typer.Option("--hosts", help="Hosts, each with an agent of its own.")] = 25,
    workers: Annotated[int, typer.Option("--workers-per-host", help="Workers of each host.")] = 8,
    seconds: Annotated[float, typer.Option(help="Seconds for which `elastic top` is measured.")] = 30.0,
    settle: Annotated[float, typer.Option(help="Seconds before them, in which it starts.")] = 5.0,
    path: Path_ = None,
) -> None:
    """Prints the share of a core that `elastic top` takes, once a second on a terminal of 50 lines."""
    folder, shape = Path(tempfile.mkdtemp(prefix="elastic-seeing-")), Shape()
    options = {"shape": {"blocks": shape.blocks, "dim": shape.dim}, "step_s": 1.0, "check_every": 0, "profile": None}
    try:
        with ExitStack() as stack:
            address, process = stack.enter_context(etcd(folder))
            made = stack.enter_context(hosts(folder, count, options))
            made.etcd = process
            start(made, address, workers, stages=8)
            made.wait(1, learnt=True)
            secret = folder / "secret"
            secret.touch(0o600)
            secret.write_text(SECRET)
            stack.callback(os.close, locked(RunDirectory(folder / "0")))
            here = watched([str(folder / "0")], seconds, settle)
            before = processor_seconds(made.processes[0][0])
            asks = watched(["large", "--etcd", address, "--secret-file", str(secret)], seconds, settle)
            coordinator = (processor_seconds(made.processes[0][0]) - before) / (seconds + settle)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    figures = {"workers": count * workers, "directory": here, "etcd": asks, "coordinator": coordinator, "load": os.getloadavg()[0]}
    print(json.dumps(figures))
    write_json(path, figures)


def locked(directory: RunDirectory) -> int:
    """Locks a run directory, as the launcher of a job does; returns the descriptor."""
    descriptor = os.open(directory.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def timed(command: list[str]) -> tuple[float, float]:
    """Runs a command. Returns its wall-clock and its processor seconds."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


IMPORT = "import time, torch; begun = time.perf_counter(); import elastic; print(time.perf_counter() - begun)"


@app.command("start")
def start_command(rounds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 9, path: Path_ = None) -> None:
    """Prints the seconds that `elastic --help` takes, and `import elastic` besides `import torch`."""
    elastic = str(Path(sys.executable).with_name("elastic"))
    helps = [timed([elastic, "--help"]) for _ in range(rounds)]
    imports = [
        float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout) for _ in range(rounds)
    ]
    of = {"help_s": [wall for wall, _ in helps], "help_cpu_s": [cpu for _, cpu in helps], "import_s": imports}
    figures = {name: {"median": statistics.median(each), "min": min(each), "max": max(each)} for name, each in of.items()}
    print(json.dumps(figures))
    write_json(path, figures)


if __name__ == "__main__":
    app()
