"""`run`: the launcher. It checks what it is given, starts an agent, and waits for the outcome; whatever happens, nothing is left behind."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from elastic import errors
from elastic.channel import Channel, Message
from elastic.errors import JobFailed, SettingsError
from elastic.membership.endpoint import Endpoint
from elastic.process import end_group, module_command
from elastic.rundir import RunDirectory
from elastic.save_summary import SaveSummary
from elastic.settings import JobSettings, agent_environment, best_isa, byte_count, own_environment
from elastic.target import name_of

_AGENT_EXIT_S = 8.0
_STOPPING = "elastic: stopping at the next step boundary; press Ctrl-C again to stop at once"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """How a job ended: what the leader's `train_fn` returned, the last epoch, and whether it was asked to stop early.

    `incidents` has, for each change of its members, the fields of `elastic.observe.incident.Incident`. `saves` says how many
    checkpoints were saved, how many saves failed, and why the last one did.
    """

    value: Any
    epoch: int
    stopped: bool
    incidents: tuple[dict[str, Any], ...] = ()
    saves: SaveSummary = field(default_factory=SaveSummary)


def run(
    train_fn: Callable[..., Any] | str,
    *,
    workers: int,
    stages: int | None = None,
    min_workers: int | None = None,
    etcd: str | None = None,
    args: Sequence[Any] = (),
    name: str | None = None,
    threads: int = 1,
    isa: str | None = None,
    seed: int = 0,
    respawn: bool = True,
    rebalance: bool = True,
    memory: int | str | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> JobResult:
    """Runs `train_fn(job, *args)` in every one of `workers` processes, and waits.

    Args:
        train_fn: a function at the top level of a module or script, or its name as `module:function` or `path.py:function`. It may
            also take only `args`, without the job.
        workers: training processes on this host.
        stages: pipeline stages; by default as many as are fastest.
        min_workers: how many workers the job may shrink to, by default 1; with fewer it pauses until new ones are ready.
        etcd: `[user:password@]host:port` of a running etcd; by default the job runs a private one.
        args: JSON values.
        name: of the job, unique in its etcd.
        threads: of one worker's operators. Bits depend on it.
        isa: `avx512`, `avx2` or `default`: the instruction set that fixes bits; by default the best of this machine.
        seed: of torch's, NumPy's and Python's generators when `train_fn` begins.
        respawn: start a new worker for each that dies; it joins at a step boundary when it is ready.
        rebalance: shift work from workers that are steadily slower than others. No bit depends on it.
        memory: what one worker's process may take, in bytes or such as `2GiB`; by default an even share of nine tenths of what its host,
            or control group, has. The planner refuses stages that need more.
        directory: where the run keeps `members.json` and `incidents.jsonl`, replacing those of an earlier run; by default a temporary
            directory, which is removed.

    Ctrl-C once stops at the next step boundary; twice at once, with KeyboardInterrupt.

    Raises:
        SettingsError: an argument is wrong, or what the workers do with it (`TrainFunctionError`, `PlanError`, `TrainerError`).
        EtcdUnavailable: etcd cannot be started, reached or logged in to.
        CheckpointError: none of the checkpoints is good, or the newest does not fit this training.
        MismatchError: the workers did not build the same thing.
        JobFailed: a worker raised, with its traceback; or so many died that the training cannot go on.
        CoverageLost: more workers died together than there are copies of the state.
        CopiesConflict: copies of the state differ that must be equal.
    """
    _refuse_inside_worker()
    settings = JobSettings(
        name=f"job-{secrets.token_hex(4)}" if name is None else name,
        workers=workers,
        train_fn=name_of(train_fn, len(args)),
        isa=best_isa() if isa is None else isa,
        args=tuple(args),
        stages=stages,
        min_workers=1 if min_workers is None else min_workers,
        etcd=etcd,
        threads=threads,
        seed=seed,
        respawn=respawn,
        rebalance=rebalance,
        memory=None if memory is None else byte_count(memory),
        directory=None if directory is None else os.path.abspath(directory),
    )
    if etcd is not None:
        Endpoint.parse(etcd)
    own = RunDirectory(Path(settings.directory or tempfile.mkdtemp(prefix="elastic-")))
    own.prepare()
    try:
        return _outcome(_supervise(settings, str(own.path)))
    finally:
        own.remove() if settings.directory is None else own.clear()


def _refuse_inside_worker() -> None:
    # Only a worker has this module loaded and set; a launcher need not load it.
    jobs = sys.modules.get("elastic.job")
    if jobs is not None and jobs.inside():
        raise SettingsError(
            "elastic.run was called in a worker, which imports the script that starts the job: "
            'put the call under `if __name__ == "__main__":`'
        )


def _supervise(settings: JobSettings, directory: str) -> Message | None:
    """The agent's last word, or None if it died without one."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        agent = subprocess.Popen(
            module_command("elastic.agent", str(theirs.fileno())),
            env=agent_environment(),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    start = {
        "type": "start",
        "settings": settings.to_json(),
        "directory": directory,
        "environment": own_environment(),
        "import_path": [entry or os.getcwd() for entry in sys.path],
        "argv": sys.argv,
    }
    with _interruptible(channel):
        try:
            channel.send(start)
            return _last_word(channel)
        finally:
            _end(agent, channel)


def _last_word(channel: Channel) -> Message | None:
    while not channel.closed:
        for message in channel.receive():
            return message
    return None


def _end(agent: subprocess.Popen[bytes], channel: Channel) -> None:
    """Waits for the agent to leave, then ends whatever else is in its process group, such as processes that `train_fn` started."""
    channel.close()
    exited = os.WEXITED | os.WNOWAIT  # not reaped: until then nobody else gets its process group id
    watchdog = threading.Timer(_AGENT_EXIT_S, agent.kill)
    watchdog.start()
    os.waitid(os.P_PID, agent.pid, exited)
    watchdog.cancel()
    end_group(agent.pid)
    agent.wait()


@contextmanager
def _interruptible(channel: Channel) -> Iterator[None]:
    """The first Ctrl-C asks the agent to stop at a step boundary, the second to stop at once. None interrupts the cleaning up."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    presses = 0

    def interrupted(_number: int, _frame: FrameType | None) -> None:
        nonlocal presses
        if channel.closed:
            return
        presses += 1
        if presses == 1:
            channel.send({"type": "stop"})
            print(_STOPPING, file=sys.stderr, flush=True)
        else:
            channel.send({"type": "kill"})
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _outcome(word: Message | None) -> JobResult:
    if word is None:
        raise JobFailed("the agent, which supervises the workers, died; the system may be out of memory")
    if word["type"] == "failed":
        kind = getattr(errors, word["kind"])
        raise kind(word["message"])
    incidents, saves = tuple(word["incidents"]), SaveSummary(**word["saves"])
    return JobResult(value=word["value"], epoch=word["epoch"], stopped=word["stopped"], incidents=incidents, saves=saves)
