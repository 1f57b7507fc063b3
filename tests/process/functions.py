"""Train functions of the process tests. They run in workers, which import this module by name."""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from elastic.errors import NotInJob, PeerLost
from elastic.recovery.inventory import Copy, Inventory
from elastic.recovery.proposal import Proposal
from elastic.settings import fingerprint
from elastic.view import View
from elastic.worker import job as jobs
from elastic.worker.job import Job
from tests.announcement import MODEL, announcement

PAUSE = threading.Event()  # never set: waiting on it makes a step slow


def facts(job: Job, text: str, number: int) -> dict[str, Any]:
    """Returns what a worker sees, gathered in the job's directory so that the leader can return all of it."""
    import torch  # not above: launchers import this module too, without torch

    subprocess.Popen(["sleep", "600"])  # a helper process that the train function does not end
    subprocess.Popen(["sleep", "600"], start_new_session=True)  # one that leaves its session, as a daemon does
    subprocess.Popen(["sh", "-c", "(sleep 600 & exec sleep 600) & exit"]).wait()  # and some whose parent has ended
    own = {
        "worker": job.worker,
        "args": [text, number],
        "current": jobs.current_job() is job,
        "parent": os.getppid(),
        "name": Path("/proc/self/comm").read_text().strip(),
        "stdin": os.readlink("/proc/self/fd/0"),
        "open": open_descriptors(),
        "secret": job.secret.hex(),
        "threads": torch.get_num_threads(),
        "random": torch.rand(()).item(),
        "fingerprint": fingerprint(),
        "protobuf": os.environ.get("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"),
        "mark": os.environ.get("ELASTIC_TEST_MARK"),
        "profile": job.profile,
        "argv": sys.argv,
        "directory": job.directory,
    }
    Path(job.directory, f"{job.worker}.tmp").write_text(json.dumps(own))
    Path(job.directory, f"{job.worker}.tmp").rename(Path(job.directory, f"{job.worker}.json"))
    while job.leader and len(list(Path(job.directory).glob("*.json"))) < job.workers:
        PAUSE.wait(0.01)
    return {path.stem: json.loads(path.read_text()) for path in Path(job.directory).glob("*.json")} if job.leader else {}


def open_descriptors() -> list[str]:
    """Returns the open descriptors of this process, without the standard streams."""
    numbers = [number for number in os.listdir("/proc/self/fd") if int(number) > 2 and os.path.lexists(f"/proc/self/fd/{number}")]
    return [os.readlink(f"/proc/self/fd/{number}") for number in numbers]


def announces(job: Job) -> dict[str, Any]:
    view = job.announce({**announcement(profile=job.profile), "fingerprint": fingerprint(), "address": f"unix:@{job.worker}"})
    return {"view": view.to_json(), "epoch": job.epoch, "leader": job.leader, "kept": job.view == view, "etcd": job.settings.etcd}


def disagrees(job: Job) -> None:
    job.announce({**announcement(profile=job.profile), "settings": {"batch_size": 32 + job.worker // 2}})


def does_not_join(job: Job) -> None:
    if job.worker != 1:
        job.announce(announcement(profile=job.profile))


def consequences(job: Job) -> None:
    """Worker 1 fails for a reason of its own; the others notice that they lost it, and do so earlier."""
    sign = Path(job.directory, "lost")
    if job.worker != 1:
        sign.touch()
        raise PeerLost("the link to worker 1 broke", peer=1)
    while not sign.exists():
        PAUSE.wait(0.01)
    job.progress(3, 17)
    raise ZeroDivisionError("the root of it")


def swallows(job: Job) -> None:
    """Worker 1's training ends, and it does not care."""
    jobs.UNHEARD_S = 0.3
    if job.worker == 1:
        job.raised(ZeroDivisionError("forgiven"))
        job.heard()
        job.raised(ZeroDivisionError("the end of the training"))
    PAUSE.wait()


def returns_a_socket() -> socket.socket:
    return socket.socket()


def exits() -> None:
    sys.exit(3)


def prints_lines(job: Job, count: int = 500) -> None:
    for line in range(count):
        print(json.dumps({"worker": job.worker, "line": line}))


def steps_until_stopped(job: Job) -> int:
    """Says that it runs; takes steps until it is asked to stop."""
    print(json.dumps({"pid": os.getpid(), "parent": os.getppid()}), flush=True)
    step = 0
    while not job.stop_requested:
        step += 1
        job.progress(1, step)
        PAUSE.wait(0.01)
    return step


def trains_until_stopped(job: Job) -> int:
    """Trains with a Trainer that saves only after its last step. Prints each step; returns the last."""
    import torch

    import elastic

    def batch(step: int, micro_batch: int) -> torch.Tensor:
        PAUSE.wait(0.01)
        return torch.full((4, 8), float(step + micro_batch))

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    places: dict[str, Any] = {"checkpoint": os.environ["CHECKPOINTS"], "every": 1 << 30}
    trainer = elastic.Trainer(model, lambda output, _: output.pow(2).mean(), optimizer, batch, batch_size=16, micro_batch_size=4, **places)
    step = -1
    for report in trainer.run(1 << 30):
        step = report.step
        if report.leader:
            print(json.dumps({"step": step, "worker": os.getpid()}), flush=True)
    return step


def never_stops(job: Job) -> None:
    """Worker 1 says that it runs and stops itself with SIGSTOP; the others say so once it has, and go on for ever."""
    grandparent = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]
    job.progress(2, 5)
    if job.worker != 1:
        wait_until_stopped(Path(job.directory, "stopping"))
    print(json.dumps({"worker": job.worker, "pid": os.getpid(), "parent": os.getppid(), "agent": int(grandparent)}), flush=True)
    if job.worker == 1:
        Path(job.directory, "pid").write_text(str(os.getpid()))
        Path(job.directory, "pid").rename(Path(job.directory, "stopping"))
        os.kill(os.getpid(), signal.SIGSTOP)
    PAUSE.wait()


def wait_until_stopped(pid_file: Path) -> None:
    while not pid_file.exists() or Path(f"/proc/{pid_file.read_text()}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        PAUSE.wait(0.01)


def outside() -> str:
    """For the launcher's side of the tests."""
    try:
        jobs.current_job()
    except NotInJob as error:
        return str(error)
    return ""


def finishes_last(job: Job, folder: str) -> bool | None:
    """Worker 1 returns at once; worker 0 looks for a second whether it stays for the others."""
    note = Path(folder) / "pid"
    if job.worker == 1:
        note.with_suffix(".new").write_text(str(os.getpid()))
        note.with_suffix(".new").rename(note)
        return None
    while not note.exists():
        PAUSE.wait(0.01)
    pidfd = os.pidfd_open(int(note.read_text()))
    try:
        return not select.select([pidfd], [], [], 1.0)[0]
    finally:
        os.close(pidfd)


def joins(job: Job) -> None:
    """Becomes a member of the first view, says so, and waits."""
    job.announce(announcement(profile=job.profile))
    print(json.dumps({"worker": job.worker, "pid": os.getpid()}), flush=True)
    PAUSE.wait()


def leader_joins_and_returns(job: Job, folder: str) -> str:
    """Worker 1 never returns: it is killed once worker 0 has."""
    job.announce(announcement(profile=job.profile))
    if job.worker == 1:
        note = Path(folder, "pid")
        note.with_suffix(".new").write_text(str(os.getpid()))
        note.with_suffix(".new").rename(note)
        PAUSE.wait()
    while not Path(folder, "pid").exists():
        PAUSE.wait(0.01)
    os.kill(int(Path(folder, "pid").read_text()), signal.SIGKILL)
    return "done"


def obeys(job: Job, folder: str, _: str = "") -> dict[str, Any]:
    """Answers the agent's orders as a Trainer would that holds all state of step 5 and moves none; returns when it finds `finish`."""
    copies = tuple(Copy(layer=layer.index, start=0, stop=layer.size, step=5, role="live") for layer in MODEL.layers)
    founder = job.announce(announcement(profile=job.profile)) is not None
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=lambda: [orders.put(job.take_order()) for _ in iter(int, 1)], daemon=True).start()
    proposed: View | None = None
    while not (Path(folder, "finish").exists() and orders.empty()):
        if job.pause_requested:
            job.pause_requested = False
            job.send({"type": "paused", "epoch": job.epoch, "step": 5})
        try:
            order = orders.get(timeout=0.02)
        except queue.Empty:
            continue
        if order["type"] == "view":
            job.switch(View.from_json(order["view"]))
            founder = True
            assert proposed == job.view
            at = time.monotonic()
            job.send({"type": "resumed", "epoch": job.epoch, "attempt": proposed.attempt, "at": at})
            job.send({"type": "committed", "epoch": job.epoch, "step": 5, "at": at})
        elif order["type"] == "quiesce":
            own = Inventory(worker=job.worker, yielded=5 if founder else -1, copies=copies if founder else ())
            job.send({"type": "inventory", "epoch": order["epoch"], "attempt": order["attempt"], "inventory": own.to_json()})
        else:
            proposed = Proposal.from_json(order["proposal"]).view
            job.send({"type": "vote", "epoch": proposed.epoch, "attempt": proposed.attempt, "refusal": None})
    return {"epoch": job.epoch, "members": job.view.workers if job.view else []}


def runs_out_of_memory(job: Job) -> None:
    job.announce(announcement(profile=job.profile))
    if job.worker == 1:
        raise MemoryError("no room")
    PAUSE.wait()


def fails_after_joining(job: Job) -> None:
    job.announce(announcement(profile=job.profile))
    if job.worker == 1:
        raise ValueError("a bug")
    PAUSE.wait()
