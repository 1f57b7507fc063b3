"""A GPT on three hosts, to which one thing after another happens; losses and parameters stay those of an undisturbed run.

    python examples/hosts.py            # in the order below
    python examples/hosts.py --seed 7   # in a random order, with random victims

The hosts are network namespaces of this machine (this needs root), and have an etcd of three members with TLS and a password. A host is
lost without a word, the network splits for 20 s, the agent that coordinates is killed, a worker is stopped, one is slowed to a tenth, one
bit of an optimizer state flips in memory, a host is drained, a host is added. The job must name each cause. The exit code is 1 if it names
one wrongly or not at all, or if a loss or a parameter differs.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from etcd_members import etcd_of_three
from gpt import StepLog, Text, build_gpt, cross_entropy, read_steps, read_text
from hosts_cluster import Cluster
from hosts_events import Happening, headline

import elastic
from elastic.chaos.namespaces import Network
from elastic.chaos.proxies import Proxies

_STEPS = 1_000_000  # more than it takes: the job is stopped when everything has happened
_ORDER = ("lose_host", "add", "split", "kill_coordinator", "stop_worker", "slow_worker", "flip", "drain", "add")


def train(job: elastic.Job, steps: int, pause_s: float = 0.0) -> str | None:
    """Runs on every worker; the leader's return value, a digest of all parameters, is the job's."""
    torch.manual_seed(0)
    model = build_gpt(layers=4, dim=64, heads=4, seq=32, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = Text(read_text(None), 32)
    trainer = elastic.Trainer(model, cross_entropy, optimizer, data, batch_size=12, micro_batch_size=2, clip_norm=1.0, seed=1)
    with StepLog(Path(job.directory), job.worker) as log:
        for report in trainer.run(steps):
            log.add(report)
            time.sleep(pause_s)
    return trainer.digest()


@contextmanager
def network_of(hosts: int, *, proxies: bool) -> Iterator[Network | Proxies]:
    """Makes a network of hosts: namespaces, or proxies where they are not permitted."""
    made: Network | Proxies = Network(f"e{os.getpid() % 100000}x", hosts, f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}")
    try:
        if not proxies:
            made.make()
    except (OSError, subprocess.CalledProcessError) as error:
        made.remove()
        why = error.stderr.decode().strip() if isinstance(error, subprocess.CalledProcessError) else error
        print(f"== network namespaces are not permitted here ({why}): TCP proxies take their place", flush=True)
        proxies = True
    if proxies:
        made = Proxies(hosts)
        made.make()
    try:
        yield made
    finally:
        made.remove()


def finished(cluster: Cluster) -> tuple[str, list[dict[str, Any]]]:
    """Stops the job; returns the digest that all hosts print, and all steps."""
    cluster.say("== everything has happened: the job is stopped")
    cluster.ask("stop")
    last = cluster.present
    for host in last:
        host.process.wait(cluster.patience_s)
    cluster.ended(last)
    (digest,) = {json.loads(host.said.splitlines()[-1]) for host in last}
    return digest, read_steps(*(host.folder for host in cluster.hosts))


def disturbed(cluster: Cluster, order: Sequence[str], seed: int | None) -> tuple[Happening, str, list[dict[str, Any]]]:
    """Runs the job on three hosts, and lets everything happen. Returns what happened, the digest, and all steps."""
    try:
        cluster.say("== three hosts start, with two workers each; etcd has three members, TLS and a password")
        for _ in range(3):
            cluster.add(least=3)
        cluster.settle(steps=20)
        happening = Happening(cluster, seed)
        for event in order:
            getattr(happening, event)()
        return happening, *finished(cluster)
    except RuntimeError:
        for host in cluster.hosts:
            print(f"host {host.number} said last:", *[line for line in host.said.splitlines() if line[:1] != " "][-8:], sep="\n  ")
        raise
    finally:
        cluster.close()


def compare(happening: Happening, digest: str, steps: list[dict[str, Any]], calm: tuple[str, list[dict[str, Any]]]) -> bool:
    """Prints what happened and what the job said of it; returns whether everything is as it should be."""
    for record in happening.records:
        print(f"{'MISSING' if record.missing else 'ok':8}{record.what}")
        for incident in record.incidents:
            print(f"{'':10}{headline(incident)}")
        for what in record.missing:
            print(f"{'':10}not recorded: {what}")
    unexplained = happening.unexplained
    for incident in unexplained:
        print(f"UNASKED {headline(incident)}")
    losses = [[step["loss"] for step in each] for each in (steps, calm[1])]
    other = {at for at, (one, two) in enumerate(zip(*losses, strict=False)) if one != two}
    same = len(losses[0]) == len(losses[1]) and other <= happening.disclaimed
    print(f"{len(losses[0])} losses {'EQUAL' if same else f'DIFFER, in steps {sorted(other)[:9]}'}")
    if same and other:
        print(f"  but for steps {sorted(other)}, which the job took again: it said that what loops were given of them may be wrong")
    print(f"disturbed   {digest}\nundisturbed {calm[0]}\ndigests {'EQUAL' if digest == calm[0] else 'DIFFER'}")
    return same and digest == calm[0] and not unexplained and not any(record.missing for record in happening.records)


def leave(number: int, _: object) -> None:
    """Ends the example, and nothing interrupts that: hosts and namespaces are removed."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main(
    seed: Annotated[int | None, typer.Option(help="Shuffle the events, and choose other victims.")] = None,
    event: Annotated[list[str] | None, typer.Option(help=f"Only this: one of {', '.join(dict.fromkeys(_ORDER))}. Repeatable.")] = None,
    proxies: Annotated[bool, typer.Option("--proxies", help="Use no namespaces, but TCP proxies between hosts.")] = False,
    patience: Annotated[float, typer.Option(help="Seconds after which something is missing that should have happened.")] = 60.0,
) -> None:
    """Trains on three hosts to which everything happens, and compares with an undisturbed run."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    order = event or list(_ORDER)
    if unknown := set(order).difference(_ORDER):
        raise typer.BadParameter(f"--event {', '.join(sorted(unknown))}: use {', '.join(dict.fromkeys(_ORDER))}")
    if seed is not None and event is None:
        random.Random(seed).shuffle(order)
    with tempfile.TemporaryDirectory(prefix="elastic-hosts-") as temporary:
        folder = Path(temporary)
        (folder / "secret").touch(0o600)
        (folder / "secret").write_text(secrets.token_hex(32))
        hosts = 3 + order.count("add")
        with network_of(hosts, proxies=proxies) as network, etcd_of_three(network.gateway, folder / "etcd") as etcd:
            cluster = Cluster(network, etcd, folder, f"{__file__}:train", [str(_STEPS), "0.05"], patience)
            happening, digest, steps = disturbed(cluster, order, seed)
        cluster.say(f"== undisturbed, {len(steps)} steps on one host with two workers")
        calm = elastic.run(f"{__file__}:train", workers=2, directory=folder / "calm", args=(len(steps),))
        same = compare(happening, digest, steps, (calm.value, read_steps(folder / "calm")))
    raise typer.Exit(0 if same else 1)


if __name__ == "__main__":
    typer.run(main)
