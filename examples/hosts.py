"""A GPT on three hosts (network namespaces of this machine, so it needs root), to which one thing after another happens.

One host's cable is cut and mended, the coordinating agent is killed, a worker is stopped, a host is drained and another one joins. At the
end losses and parameters are compared with those of an undisturbed run on one host.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from gpt import Text, build_gpt, cross_entropy, read_text
from namespaces import Network, etcd_at

import elastic

STEPS, HOSTS, WORKERS, PATIENCE_S = 700, 4, 2, 90.0


def train(job: elastic.Job, steps: int) -> dict[str, Any]:
    """Runs on every worker; the leader's return value is the job's."""
    torch.manual_seed(0)
    model = build_gpt(layers=4, dim=64, heads=4, seq=32, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = Text(read_text(None), 32)
    trainer = elastic.Trainer(model, cross_entropy, optimizer, data, batch_size=24, micro_batch_size=2, clip_norm=1.0, seed=1)
    losses = []
    for report in trainer.run(steps):
        losses.append(report.loss)
        if report.leader and report.step % 50 == 0:
            print(f"step {report.step} loss {report.loss:.4f} {report.layout}", flush=True)
    return {"digest": trainer.digest(), "last": losses[-1]}


class Host:
    """One `elastic agent`, in the namespace of this number."""

    def __init__(self, net: Network, etcd: str, folder: Path, number: int, least: int = 1) -> None:
        self.number, self.folder = number, folder / f"host{number}"
        self.log = folder / f"host{number}.txt"
        flags = ["--etcd", etcd, "--job", "gpt", "--secret-file", str(folder / "secret"), "--workers", str(WORKERS)]
        flags += ["--hosts-min", str(least), "--directory", str(self.folder)]
        command = [*net.command(number), sys.executable, "-m", "elastic.cli.main", "agent", *flags, f"{__file__}:train", str(STEPS)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])}
        with self.log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def members(self) -> dict[str, Any]:
        return json.loads((self.folder / "members.json").read_text())

    @property
    def incidents(self) -> list[dict[str, Any]]:
        with suppress(OSError):
            return [json.loads(line) for line in (self.folder / "incidents.jsonl").read_text().splitlines()]
        return []


def until(what: str, there: Callable[[], bool]) -> None:
    """Waits, and says what for. Raises RuntimeError if it takes too long."""
    began = time.monotonic()
    while not there():
        if time.monotonic() - began > PATIENCE_S:
            raise RuntimeError(f"waited {PATIENCE_S:g} s for: {what}")
        time.sleep(0.05)
    print(f"   {what}: after {time.monotonic() - began:.1f} s", flush=True)


def happened(hosts: list[Host], kind: str, least: int = 1) -> Callable[[], bool]:
    """Returns a condition: some living host's log has so many incidents of a kind."""
    return lambda: max(sum(each["kind"] == kind for each in host.incidents) for host in hosts) >= least


def parent(pid: int) -> int | None:
    """Returns the parent of a process, None if it has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def disturb(net: Network, etcd: str, folder: Path) -> list[Host]:
    """Founds the job on three hosts, and lets everything happen. Returns the hosts."""
    first = Host(net, etcd, folder, 0, least=3)
    until("the first host waits", lambda: "waiting for 2 more hosts" in first.said)
    hosts = [first, Host(net, etcd, folder, 1), Host(net, etcd, folder, 2)]
    until("three hosts train", lambda: "step 50 " in "".join(host.said for host in hosts))
    print("== host 2 vanishes without a word: its cable is cut, and mended after 5 s", flush=True)
    net.cut(2)
    until("noticed, and training goes on", happened(hosts[:2], "death"))
    time.sleep(5.0)
    net.heal(2)
    until("it is back", happened(hosts[:2], "join"))
    print("== the agent that coordinates the job is killed", flush=True)
    os.kill(hosts[0].members["agent"], signal.SIGKILL)
    until("another one coordinates, and training goes on", happened(hosts[1:], "death", 2))
    until("its host is back", happened(hosts[1:], "join", 2))
    print("== a worker of host 1 is stopped", flush=True)
    own = hosts[1].members
    victim = next(each["pid"] for each in own["members"] if each["pid"] is not None and parent(each["pid"]) == own["forkserver"])
    os.kill(victim, signal.SIGSTOP)
    until("it is replaced", happened(hosts[1:], "eviction"))
    print("== host 1 is drained, and host 3 joins", flush=True)
    hosts[1].process.send_signal(signal.SIGTERM)
    until("it has left", lambda: hosts[1].process.poll() is not None)
    before = max(sum(each["kind"] == "join" for each in host.incidents) for host in (hosts[0], hosts[2]))
    hosts.append(Host(net, etcd, folder, 3))
    until("the new host trains", happened([hosts[0], hosts[2], hosts[3]], "join", before + 1))
    return hosts


def main() -> int:
    """Runs everything; returns the exit code."""
    print("== undisturbed, one worker", flush=True)
    calm = elastic.run(train, workers=1, args=(STEPS,)).value
    net = Network(f"e{os.getpid() % 100000}x", HOSTS, f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}")
    hosts: list[Host] = []
    with tempfile.TemporaryDirectory(prefix="elastic-hosts-") as temporary:
        folder = Path(temporary)
        (folder / "secret").write_text(secrets.token_hex(32))
        (folder / "secret").chmod(0o600)
        try:
            net.make()
            with etcd_at(net.gateway, folder / "etcd") as etcd:
                print("== three hosts", flush=True)
                hosts = disturb(net, etcd, folder)
                stay = [host for host in hosts if host.process.poll() is None]
                ends = [host.process.wait(PATIENCE_S) for host in stay]
                for host in stay[:1]:
                    print(
                        "".join(line for line in host.said.splitlines(keepends=True) if "planned:" not in line and "warning:" not in line)
                    )
                values = [json.loads(host.said.splitlines()[-1]) for host in stay if host.said.strip()]
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"error: this example needs root, `ip` and network namespaces: {error}", file=sys.stderr)
            return 1
        finally:
            for host in hosts:
                host.process.kill()
            net.remove()
    equal = ends == [0] * len(ends) and all(value == calm for value in values)
    print(f"undisturbed {calm['digest']}\ndisturbed   {values[0]['digest']}\ndigests {'EQUAL' if equal else 'DIFFER'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
