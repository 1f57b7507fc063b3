"""The command `elastic run`: a job of this host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elastic.cli.ran import Log, MetricsPort, Progress, Report, Trace, printed


def run(
    target: Annotated[
        str, typer.Argument(help="The train function: path.py:function or module:function; or path.py, a script that runs as a whole.")
    ],
    args: Annotated[
        list[str] | None,
        typer.Argument(help="Its arguments after the job: JSON values, or plain strings; a script's own, options behind --."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 2,
    stages: Annotated[int | None, typer.Option(help="Pipeline stages; by default the planner chooses.")] = None,
    min_workers: Annotated[int | None, typer.Option(help="How many workers the job may shrink to; with fewer it pauses.")] = None,
    etcd: Annotated[str | None, typer.Option(help="[user@]host:port[,host:port...]; by default one is started for the job.")] = None,
    etcd_ca: Annotated[Path | None, typer.Option(help="Reach etcd by TLS; certificates that sign etcd's, PEM.")] = None,
    etcd_cert: Annotated[Path | None, typer.Option(help="This client's certificate for etcd, PEM.")] = None,
    etcd_key: Annotated[Path | None, typer.Option(help="The key of --etcd-cert, PEM.")] = None,
    etcd_password_file: Annotated[Path | None, typer.Option(help="The password of etcd's user, readable by you alone.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job, unique in its etcd.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of one worker's operators; bits depend on it.")] = 1,
    isa: Annotated[str | None, typer.Option(help="avx512, avx2 or default; by default the best of this machine.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all generators when the train function begins.")] = 0,
    respawn: Annotated[bool, typer.Option(help="Start a new worker for each that dies.")] = True,
    spares: Annotated[int, typer.Option(help="Further processes that wait to replace a lost worker at once.")] = 0,
    copies: Annotated[int, typer.Option(help="Copies of the state in all, each on another host, as far as there are so many.")] = 2,
    rebalance: Annotated[bool, typer.Option(help="Shift work from workers that are steadily slower.")] = True,
    stopped_after: Annotated[float, typer.Option(help="Replace a worker that is stopped for so many seconds; 0: wait for it.")] = 1.0,
    hung_after: Annotated[float, typer.Option(help="Replace a worker that hangs in a step for so many seconds; 0: wait for it.")] = 3.0,
    drain_on: Annotated[
        str | None, typer.Option(help="Stop, and save, when a notice of termination appears: aws, azure, gcp, http://... or file:PATH.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Begin with this plan, a file of `elastic plan --save`.")] = None,
    dvfs: Annotated[str, typer.Option(help="GPU clocks: off, speed (raise the bottleneck's) or energy (lower those that wait).")] = "off",
    device: Annotated[
        str,
        typer.Option(help="What workers compute on, each on a device of its own: cpu, cuda, or auto (cuda where it is usable)."),
    ] = "cpu",
    workers_per_device: Annotated[int, typer.Option(help="Workers that share a device.")] = 1,
    directory: Annotated[Path | None, typer.Option(help="Keep members.json, incidents.jsonl, events, steps and output here.")] = None,
    log: Log = None,
    progress: Progress = None,
    metrics_port: MetricsPort = None,
    trace: Trace = None,
    report: Report = None,
) -> None:
    """Runs a train function on several workers; prints the leader's return value as JSON."""
    printed(
        target,
        args,
        workers=workers,
        stages=stages,
        min_workers=min_workers,
        etcd=etcd,
        etcd_ca=etcd_ca,
        etcd_cert=etcd_cert,
        etcd_key=etcd_key,
        etcd_password_file=etcd_password_file,
        name=name,
        threads=threads,
        isa=isa,
        seed=seed,
        respawn=respawn,
        spares=spares,
        copies=copies,
        rebalance=rebalance,
        stopped_after=stopped_after or None,
        hung_after=hung_after or None,
        drain_on=drain_on,
        plan=plan,
        dvfs=dvfs,
        device=device,
        workers_per_device=workers_per_device,
        directory=directory,
        log=log or (),
        progress=progress,
        metrics_port=metrics_port,
        trace=trace,
        report=report,
    )
