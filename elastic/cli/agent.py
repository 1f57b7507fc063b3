"""The command `elastic agent`: one host's part in a job of several hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elastic.cli.ran import Log, MetricsPort, Progress, Report, Trace, printed
from elastic.launch.sharing import read_secret


def agent(
    target: Annotated[str, typer.Argument(help="The train function: path.py:function or module:function.")],
    etcd: Annotated[str, typer.Option(help="[user@]host:port[,host:port...] of the etcd that all hosts use.")],
    job: Annotated[str, typer.Option(help="The job's name: hosts that give the same train together.")],
    secret_file: Annotated[Path, typer.Option(help="A file with the job's secret, the same on every host, readable by you alone.")],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments after the job: JSON values, or plain strings.")] = None,
    etcd_ca: Annotated[Path | None, typer.Option(help="Reach etcd by TLS; certificates that sign etcd's, PEM.")] = None,
    etcd_cert: Annotated[Path | None, typer.Option(help="This client's certificate for etcd, PEM.")] = None,
    etcd_key: Annotated[Path | None, typer.Option(help="The key of --etcd-cert, PEM.")] = None,
    etcd_password_file: Annotated[Path | None, typer.Option(help="The password of etcd's user, readable by you alone.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes on this host.")] = 2,
    spares: Annotated[int, typer.Option(help="Further processes on this host that wait to replace a lost worker at once.")] = 0,
    copies: Annotated[int, typer.Option(help="Copies of the state in all, each on another host; with 3, any two may be lost.")] = 2,
    hosts_min: Annotated[int, typer.Option(help="How many hosts found the job; later ones join it.")] = 1,
    interface: Annotated[str | None, typer.Option(help="This host's IP address for the others; by default that towards etcd.")] = None,
    rack: Annotated[
        str | None, typer.Option(help="The rack (power, switch) of this host; copies are kept in others. By default $ELASTIC_RACK.")
    ] = None,
    drain_on: Annotated[
        str | None, typer.Option(help="Drain this host when a notice of termination appears: aws, azure, gcp, http://... or file:PATH.")
    ] = None,
    tls: Annotated[bool, typer.Option(help="Encrypt what hosts send each other, with a certificate made from the secret.")] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Do so with this host's own certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The key of --tls-cert, PEM, readable by you alone.")] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="Certificates that sign those of all hosts, PEM.")] = None,
    stages: Annotated[int | None, typer.Option(help="Pipeline stages; by default the planner chooses.")] = None,
    min_workers: Annotated[int | None, typer.Option(help="How many workers the job may shrink to; with fewer it waits.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of one worker's operators; bits depend on it.")] = 1,
    isa: Annotated[str | None, typer.Option(help="avx512, avx2 or default; by default the best of the founder's machine.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all generators when the train function begins.")] = 0,
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
    """Takes part in a job with the workers of this host: founds it, or joins it. The founder's settings count; others' are compared."""
    printed(
        target,
        args,
        lambda: {"secret": read_secret(secret_file)},
        workers=workers,
        etcd=etcd,
        etcd_ca=etcd_ca,
        etcd_cert=etcd_cert,
        etcd_key=etcd_key,
        etcd_password_file=etcd_password_file,
        name=job,
        spares=spares,
        copies=copies,
        hosts_min=hosts_min,
        interface=interface,
        rack=rack,
        drain_on=drain_on,
        tls=tls,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_ca=tls_ca,
        stages=stages,
        min_workers=min_workers,
        threads=threads,
        isa=isa,
        seed=seed,
        device=device,
        workers_per_device=workers_per_device,
        directory=directory,
        log=log or (),
        progress=progress,
        metrics_port=metrics_port,
        trace=trace,
        report=report,
    )
