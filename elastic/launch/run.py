"""The launcher: `run` checks its arguments, starts an agent, waits for the outcome, and always cleans up."""

from __future__ import annotations

import glob
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from elastic import errors
from elastic.agent.save_summary import SaveSummary
from elastic.agent.start import Sharing
from elastic.errors import HostLost, PlanError, PowerError, SettingsError, Terminated
from elastic.host.channel import Channel, Message
from elastic.host.process import end_session, import_path, module_command
from elastic.host.rundir import RunDirectory
from elastic.host.signals import StopRequests, exit_code, shielded
from elastic.host.temporary import temporary
from elastic.launch import limits, ranks
from elastic.launch.callbacks import Audience
from elastic.launch.seeing import Seeing
from elastic.launch.sharing import read_credentials, sharing_of
from elastic.membership.endpoint import EtcdEndpoint
from elastic.observe.console import say
from elastic.script.target import WHOLE, name_of, own_modules
from elastic.settings import JobSettings, agent_environment, best_isa, byte_count, clocks_directory, job_mark, own_environment

_AGENT_EXIT_S = 8.0
_RESTARTS, _RESTART_S = 3, 60.0  # an agent of a shared job is restarted so often within this time
_COMPARED = (
    *("args", "stages", "min_workers", "threads", "seed", "respawn", "rebalance", "stopped_after", "hung_after", "memory", "copies"),
    *("device", "workers_per_device"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """The result of a job: the return value of the leader's `train_fn` (through JSON: tuples become lists, keys of dicts strings), the
    last epoch, and whether the job was asked to stop early.

    `incidents` has, for each change of its members, the fields of `elastic.observe.incident.Incident`. `saves` counts the saved
    checkpoints and the failed saves, with the reason of the last failure. `skipped` lists the skipped steps, see
    `Trainer(on_nonfinite=)`.
    """

    value: Any
    epoch: int
    stopped: bool
    incidents: tuple[dict[str, Any], ...] = ()
    saves: SaveSummary = field(default_factory=SaveSummary)
    skipped: tuple[int, ...] = ()

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> JobResult:
        """Returns the result with these fields, which have gone through JSON."""
        sequences = {name: tuple(data[name]) for name in ("incidents", "skipped")}
        return cls(**{**data, **sequences, "saves": SaveSummary(**data["saves"])})


def run(
    train_fn: Callable[..., Any] | str,
    *,
    workers: int | None = None,
    stages: int | None = None,
    min_workers: int | None = None,
    etcd: str | None = None,
    etcd_ca: str | os.PathLike[str] | None = None,
    etcd_cert: str | os.PathLike[str] | None = None,
    etcd_key: str | os.PathLike[str] | None = None,
    etcd_password_file: str | os.PathLike[str] | None = None,
    args: Sequence[Any] = (),
    name: str | None = None,
    threads: int = 1,
    isa: str | None = None,
    seed: int = 0,
    respawn: bool = True,
    spares: int = 0,
    copies: int = 2,
    rebalance: bool = True,
    memory: int | str | None = None,
    stopped_after: float | None = 1.0,
    hung_after: float | None = 3.0,
    plan: str | os.PathLike[str] | None = None,
    dvfs: Literal["off", "speed", "energy"] = "off",
    device: str = "cpu",
    workers_per_device: int = 1,
    directory: str | os.PathLike[str] | None = None,
    secret: bytes | str | None = None,
    hosts_min: int = 1,
    interface: str | None = None,
    rack: str | None = None,
    drain_on: str | None = None,
    tls: bool = False,
    tls_cert: str | os.PathLike[str] | None = None,
    tls_key: str | os.PathLike[str] | None = None,
    tls_ca: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Any] = (),
    log: str | Sequence[str] = (),
    progress: bool | None = None,
    metrics_port: int | str | None = None,
    trace: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
) -> JobResult:
    """Runs `train_fn(job, *args)` in each of `workers` processes, and waits until the job has ended.

    With `secret` the job may have several hosts: each runs this, or `elastic agent`, with the same `name`, `etcd` and `secret`. The first
    host founds the job when `hosts_min` hosts are there; later ones join it. Every host gets the job's result.

    Args:
        train_fn: a function at the top level of a module or script, or its name as `module:function` or `path.py:function`. It may
            also take only `args`, without the job.
        workers: number of training processes on this host. It may be left out where torchrun, or a launcher like it, has started several
            processes: then there is one worker for each, and all of these processes return the job's result.
        stages: number of pipeline stages; by default the fastest.
        min_workers: how many workers the job may shrink to, by default 1; with fewer it pauses until new ones are ready.
        etcd: `[user[:password]@]host:port[,host:port...]` of a running etcd, by any of its members; or `unix:/path` of its socket on this
            host; by default a private one. While it cannot be reached the job waits, 10 minutes at most.
        etcd_ca: a file with the certificates that sign those of etcd, which is then reached by TLS.
        etcd_cert: a file with this client's certificate, where etcd wants one.
        etcd_key: a file with its key.
        etcd_password_file: a file with the password of etcd's user, which only you can read. It is read again when etcd wants a new login:
            so a password may change while the job runs.
        args: JSON values.
        name: the job's name, unique in its etcd.
        threads: number of threads of one worker's operators. The bits of results depend on it.
        isa: `avx512`, `avx2` or `default`: the instruction set, on which bits depend; by default the best of this machine.
        seed: seed of torch's, NumPy's and Python's generators when `train_fn` begins.
        respawn: start a new worker for each that dies; it joins at a step boundary when it is ready.
        spares: number of further processes on this host that are started, have built the model and have run its layers once. One of them
            joins at once when a worker is lost (or on `elastic scale`), and a new spare is started for it. It takes no processor time while
            it waits, and memory for one model.
        copies: how many copies of the state there are in all, each on another host as far as there are so many. With 2, one host may be
            lost at a time, with 3 any two at the same moment; with 1 the job goes back to a checkpoint. A copy takes memory for the state
            of the step and of the one before, and gradients are sent to it. On one host there is one, in memory that outlives workers.
        rebalance: shift work from workers that are steadily slower than others. No bit depends on it.
        memory: limit of one worker's memory, in bytes or a text such as `2GiB`; by default an even share of nine tenths of the memory of
            its host or control group. The planner refuses stages that need more.
        stopped_after: a worker whose process is stopped (SIGSTOP, a frozen control group, a debugger) for so many seconds while others wait
            is killed and replaced, and nothing is lost; None: it is waited for.
        hung_after: so is a worker for which others wait and that makes no progress in a phase of a step for so many seconds: it sleeps, or
            for a third of that time it uses ten times as much processor time as that phase ever took. The limit is 3 times as long for
            data loaders, and 100 times for code of `train_fn` outside steps that neither computes nor reads nor writes; such code may
            compute for as long as it likes. None: hung workers are waited for.
        plan: a file of `elastic plan --save`. The job begins with its stages, members and routes; when members change later, the planner
            decides. A plan for other members, another model, batch or version is refused.
        dvfs: "speed" raises the clocks of GPUs that others wait for, "energy" lowers those of GPUs that wait; no bit depends on it. Workers
            name their GPUs with `job.use_gpu`. Clocks are restored however the job ends. Without permission no clock is changed, and one
            line says what to do. One host only.
        device: what workers compute on: `cpu`, `cuda`, another kind of device that torch knows (a module that train_fn's module imports may
            add one), or `auto`: `cuda` where there is a usable GPU, else `cpu`. Each worker, spares included, gets a device of its own, the
            first of those in CUDA_VISIBLE_DEVICES that no other worker of the host has. A model may be built on the CPU: the Trainer moves
            it. Bits are equal on all layouts of one kind of device. Nothing has been run on a real GPU yet, see docs/gpu.md.
        workers_per_device: how many workers share a device.
        directory: directory for `members.json` and `incidents.jsonl`, which replace those of an earlier run; by default a temporary
            directory, which is removed. One that belongs to another user, in which every user may write, or which another running job
            uses, is refused.
        secret: at least 16 random bytes, known to the hosts of this job alone: who has it can take part, and read the state. It is never
            written anywhere.
        hosts_min: how many hosts found the job. Settings are the founder's; another host's, where they are no defaults, must be equal.
        interface: the IP address at which other hosts reach this one; by default that on the way to etcd.
        rack: the name of what this host shares with others that may be lost together with it (a rack, its power, its switch); by default
            that in the environment variable ELASTIC_RACK. Copies of a worker's state are kept in another rack, if there is one, else on
            another host. A host without one is a rack of its own.
        drain_on: where a notice appears that this machine is about to be taken away: `aws`, `azure` or `gcp`, the metadata service of a
            spot instance (`aws=http://...`: at another address), `http://...`, a URL that answers 404 or 204 until then and then 200, or
            `file:PATH`, a file that is made then. It is looked for every second, and acts like SIGTERM.
        tls: encrypt what hosts send each other (TLS 1.3), with a certificate made from `secret`. All hosts must give the same. Within a
            host nothing is encrypted.
        tls_cert: a file with this host's own certificate, to be used instead; it implies `tls`, and does not replace the secret.
        tls_key: a file with the key of `tls_cert`.
        tls_ca: a file with the certificates that sign those of all hosts.
        callbacks: objects with some of the methods of `elastic.Callback`, called in this process, not in workers.
        log: where metrics of steps are written besides: `tensorboard:DIRECTORY`, `wandb:PROJECT[/RUN]` or `mlflow:[URI#]EXPERIMENT`, or
            several of them; `otel:SERVICE` sends incidents as spans. Their packages are installed separately. Each step is written once.
        progress: show a progress bar on stderr; by default if that is a terminal.
        metrics_port: answer Prometheus at this port of 127.0.0.1, or at `ADDRESS:PORT`; 0 takes a free port, which is printed.
        trace: write what each worker did when into this file, for https://ui.perfetto.dev or chrome://tracing. Of a job of several hosts,
            each host writes its own workers.
        report: write a page about the run into this HTML file when it ends: loss, throughput, layout, incidents, memory.

    The first Ctrl-C stops the job at the next step boundary, where a Trainer saves, and `JobResult.stopped` is True; the second stops it at
    once, with KeyboardInterrupt. SIGTERM and SIGHUP do the same, and end the program: they raise Terminated, which exits with 143 or 129. A
    signal that was ignored before, such as SIGINT after `&`, stays ignored. Outside the main thread, signal handlers do not change.

    Raises:
        SettingsError: an argument is wrong, or its use by the workers (`TrainFunctionError`, `PlanError`, `TrainerError`).
        EtcdUnavailable: etcd cannot be started, reached or logged in to.
        CheckpointError: none of the checkpoints is good, or the newest does not fit this training.
        MismatchError: the workers differ in model, initial weights, settings, checkpoint, code or numeric environment.
        NameTaken: another job has the name; a SettingsError.
        HostRefused: the job of other hosts has other settings, code or versions; a MismatchError.
        HostUnfit: this host failed its check before it joined a job of other hosts.
        HostLost: this host is lost to a job that did not fail itself, or other hosts are with its state: start it again; a JobFailed.
        NameLost: the job could not reach its etcd for a while, and another job has taken its name; a JobFailed.
        JobFailed: a worker raised, with its traceback; or so many died that the training cannot continue.
        CoverageLost: more workers died together than there are copies of the state.
        CopiesConflict: copies of the state differ that must be equal.
        Terminated: SIGTERM, SIGHUP or the notice of `drain_on` arrived, and the job has stopped. It is a SystemExit.
    """
    _refuse_inside_worker()
    _refuse_nowhere()
    rank = ranks.check(shared=secret is not None)
    workers = ranks.workers_of(rank, workers)
    files = {name: None if path is None else os.path.abspath(path) for name, path in (("trace", trace), ("report", report))}
    seeing = Seeing(callbacks=callbacks, log=log, progress=progress, metrics_port=metrics_port, shared=secret is not None, **files)
    settings = JobSettings(
        name=f"job-{secrets.token_hex(4)}" if name is None else name,
        workers=workers,
        train_fn=name_of(train_fn, len(args)),
        isa=best_isa() if isa is None else isa,
        args=tuple(args),
        stages=stages,
        min_workers=1 if min_workers is None else min_workers,
        etcd=etcd,
        etcd_files=_given_files(ca=etcd_ca, cert=etcd_cert, key=etcd_key, password_file=etcd_password_file),
        threads=threads,
        seed=seed,
        respawn=respawn,
        spares=spares,
        copies=copies,
        rebalance=rebalance,
        memory=None if memory is None else byte_count(memory),
        stopped_after=stopped_after,
        hung_after=hung_after,
        plan=None if plan is None else _saved_plan(plan, workers, stages),
        dvfs=dvfs,
        device=device,
        workers_per_device=workers_per_device,
        directory=None if directory is None else os.path.abspath(directory),
        shared=secret is not None,
    )
    if secret is None:
        if tls or tls_cert or tls_key or tls_ca:
            raise SettingsError("tls=... is for a job of several hosts: give secret= too. A job of one host sends nothing over the network")
        if rack is not None:
            raise SettingsError(f"rack={rack!r} is for a job of several hosts: give secret= too. A job of one host keeps no copy elsewhere")
        return ranks.hosted(rank, lambda: launched(settings, drain_on=drain_on, seeing=seeing), asdict, JobResult.of_json)
    credentials = read_credentials(tls_cert, tls_key, tls_ca)
    given = {field: value for field, value in settings.to_json().items() if field in _COMPARED and value != _default(field)}
    if isa is not None:
        given["isa"] = isa
    sharing = sharing_of(etcd, settings.etcd_files, secret, interface, hosts_min, given, credentials, tls=tls, rack=rack)
    return ranks.hosted(rank, lambda: launched(settings, sharing, drain_on, seeing), asdict, JobResult.of_json)


def _given_files(**paths: str | os.PathLike[str] | None) -> dict[str, str]:
    return {name: os.path.abspath(path) for name, path in paths.items() if path is not None}


def _without_password(argument: str, etcd: str | None) -> str:
    """Returns an argument of this program as its workers see it: without the password that etcd= may have."""
    return argument if etcd is None else argument.replace(etcd, etcd.rpartition("@")[2])


def _default(field: str) -> Any:
    return next(each.default for each in fields(JobSettings) if each.name == field)


def launched(settings: JobSettings, sharing: Sharing | None = None, drain_on: str | None = None, seeing: Seeing | None = None) -> JobResult:
    """Runs the job of these settings, with `sharing` together with other hosts, and waits. Returns and raises what `run` does."""
    if drain_on is not None:
        from elastic.host.notices import notice_source  # few jobs need it

        notice_source(drain_on)
    if settings.etcd is not None:
        EtcdEndpoint.parse(settings.etcd, settings.etcd_files)
    elif settings.etcd_files:
        raise SettingsError("etcd_ca=, etcd_cert=, etcd_key= and etcd_password_file= are for an etcd of yours: give etcd= too")
    limits.check(settings.workers + settings.spares, settings.directory)
    _restore_clocks()
    requests, restarts, trained = StopRequests(), list[float](), list[str]()
    seeing = seeing or Seeing(progress=False)
    with requests.caught():
        own = temporary() if settings.directory is None else RunDirectory(Path(settings.directory))
        with own.prepared() as lock:
            try:
                with seeing.opened(settings.name, own) as audience:
                    supervise = partial(_supervise, settings, sharing, drain_on, str(own.path), lock, requests, trained, seeing, audience)
                    word = supervise()
                    while sharing is not None and requests.first is None and (why := _leaves(word, restarts)) is not None:
                        restarts.append(time.monotonic())
                        say(f"{why}: a new agent of this host takes part in the job")
                        word = supervise()
                result = _outcome(_asked_to_leave(word) if requests.first is not None else word)
            finally:
                own.remove() if settings.directory is None else own.clear()
                _restore_clocks()
    if requests.first is not None and requests.first is not signal.SIGINT:
        raise Terminated(exit_code(requests.first), result)
    return result


def _restore_clocks() -> None:
    """Restores clocks of GPUs that are left if the agent and its guardian were killed together, of this job or of an earlier one."""
    if glob.glob("GPU-*.json", root_dir=clocks_directory()):  # unlike a Path's, it is silent about a directory of another user
        from elastic.power.keeper import restore_left  # most jobs do not need it

        try:
            restored, complaints = restore_left(clocks_directory())
        except PowerError as error:
            restored, complaints = [], [str(error)]
        if restored:
            say(f"a job that was killed had left locked clocks of GPUs; they are restored: {', '.join(restored)}")
        for complaint in complaints:
            say(f"a clock of a GPU that a killed job has set is not restored: {complaint}")


def _leaves(word: Message | None, restarts: list[float]) -> str | None:
    """Returns why an agent has left a job of several hosts that may go on without it; None if the job has ended, or agents die often."""
    if len([at for at in restarts if time.monotonic() - at < _RESTART_S]) >= _RESTARTS:
        return None
    if word is None:
        return "the agent of this host died"
    return word["why"] if word["type"] == "rejoin" else None


def _asked_to_leave(word: Message | None) -> Message | None:
    """Returns the outcome of an agent that was to end: if the job has done without its host meanwhile, it has left as it was asked to."""
    if word is None or word["type"] != "rejoin":
        return word
    say(f"this host leaves the job, which may go on without it: {word['why']}")
    return {"type": "drained"}


def _saved_plan(path: str | os.PathLike[str], workers: int, stages: int | None) -> dict[str, Any]:
    """Loads the plan from a file. The job's model and batch are compared with it later, when the workers are ready."""
    from elastic.plan.saved import load  # most jobs do not need it

    saved = load(path)
    if workers != len(saved.hosts):
        raise PlanError(f"plan={os.fspath(path)!r} is for {len(saved.hosts)} workers, and workers={workers}")
    if stages not in (None, len(saved.plan.stages)):
        raise PlanError(f"plan={os.fspath(path)!r} has {len(saved.plan.stages)} stages, and stages={stages}: leave stages= out")
    return saved.to_json()


def _refuse_inside_worker() -> None:
    # Only a worker has this module loaded and set; a launcher need not load it.
    jobs = sys.modules.get("elastic.worker.job")
    if jobs is None or not jobs.inside():
        return
    if jobs.current_job().settings.train_fn.endswith(f":{WHOLE}"):
        raise SettingsError(
            "elastic.run was called in a script that runs as a whole in each worker: start it with python, or name the function with "
            "`elastic run script.py:function`; a whole script gets its job by elastic.current_job()"
        )
    raise SettingsError(
        'elastic.run was called in a worker, which imports the script that starts the job: put the call under `if __name__ == "__main__":`'
    )


def _refuse_nowhere() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise SettingsError(
            "the working directory of this program was removed, and torch cannot be loaded without one: start it in an existing directory"
        ) from error


def _supervise(
    settings: JobSettings,
    sharing: Sharing | None,
    drain_on: str | None,
    directory: str,
    lock: int,
    requests: StopRequests,
    trained: list[str],
    seeing: Seeing,
    audience: Audience,
) -> Message | None:
    """Runs an agent, which keeps the descriptor `lock` open. Returns its final message, None if it died without one.

    `trained` gets the incarnation of the job once it trains; later agents join only that one. `audience` gets what the agent tells of it.
    """
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs, shielded():
        agent = subprocess.Popen(
            module_command("elastic.agent.main", str(theirs.fileno())),
            env=agent_environment(),
            pass_fds=[theirs.fileno(), lock],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    start = {
        "type": "start",
        "settings": settings.to_json(),
        "directory": directory,
        "environment": own_environment(),
        "import_path": import_path(),
        "argv": [_without_password(argument, settings.etcd) for argument in sys.argv],
        "modules": own_modules(),
        "sharing": None if sharing is None else asdict(sharing),
        "incarnation": trained[-1] if trained else None,
        "drain_on": drain_on,
        "watches": seeing.watches,
        "bar": seeing.bar,
        "traces": seeing.trace is not None,
    }
    try:
        channel.send(start)
        with requests.forwarded(channel):
            return _last_word(channel, requests, trained, audience)
    finally:
        _end(agent, channel, directory)


def _last_word(channel: Channel, requests: StopRequests, trained: list[str], audience: Audience) -> Message | None:
    while not channel.closed:
        for message in channel.receive():
            if message["type"] == "trains":
                trained.append(message["incarnation"])
            elif message["type"] == "noticed":
                requests.noticed()
            elif message["type"] == "seen":
                audience.put(message)
            else:
                return message
    return None


def _end(agent: subprocess.Popen[bytes], channel: Channel, directory: str) -> None:
    """Waits for the agent to exit, then ends the remaining processes of the job, such as those that `train_fn` started."""
    channel.close()
    exited = os.WEXITED | os.WNOWAIT  # not reaped: until then no other process can get its session id
    watchdog = threading.Timer(_AGENT_EXIT_S, agent.kill)
    watchdog.start()
    with suppress(ChildProcessError):  # if the program ignores SIGCHLD, or reaps all its children itself
        os.waitid(os.P_PID, agent.pid, exited)
    watchdog.cancel()
    end_session(agent.pid, "=".join(job_mark(directory)))
    agent.wait()


def _outcome(word: Message | None) -> JobResult:
    if word is None:
        raise HostLost("the agent, which supervises the workers, died; the system may be out of memory")
    if word["type"] == "failed":
        kind = getattr(errors, word["kind"])
        raise kind(word["message"])
    if word["type"] == "rejoin":
        raise HostLost(f"this host leaves the job, which may go on without it: {word['why']}")
    if word["type"] == "drained":
        return JobResult(value=None, epoch=0, stopped=True)
    incidents, saves = tuple(word["incidents"]), SaveSummary(**word["saves"])
    return JobResult(
        value=word["value"],
        epoch=word["epoch"],
        stopped=word["stopped"],
        incidents=incidents,
        saves=saves,
        skipped=tuple(word["skipped"]),
    )
