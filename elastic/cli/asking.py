"""`elastic status`, `scale`, `drain`, `kill` and `stop`: requests to a running job of several hosts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from elastic.cli.asker import Asker, Files
from elastic.errors import ElasticError

Job = Annotated[str, typer.Argument(help="The job's name.")]
Etcd = Annotated[str | None, typer.Option(help="As for `elastic agent`.")]
Secret = Annotated[Path | None, typer.Option(help="A file with the job's secret.")]
File = Annotated[Path | None, typer.Option(help="As for `elastic agent`.")]


_COPIES = {
    "other racks": "each in another rack",
    "other hosts": "each on another host; a rack that is lost as a whole takes both copies with it if it has both hosts",
    "workers": "each with another worker of the same host",
    "": "none: the state of workers is in the memory of their own host, which outlives them",
}
_SEVERAL = (
    "a job of several hosts is asked with --etcd and --secret-file, as its agents were started. A job of one host has no etcd of its own "
    "that answers: look at it with `elastic top {job}`, and stop it with Ctrl-C, or SIGTERM to its `elastic run`"
)
_APART = "each on another host, and in another rack as long as there are enough"


def status(
    job: Job,
    etcd: Etcd = None,
    secret_file: Secret = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    etcd_ca: File = None,
    etcd_cert: File = None,
    etcd_key: File = None,
    etcd_password_file: File = None,
    tls_cert: File = None,
    tls_key: File = None,
    tls_ca: File = None,
) -> None:
    """Shows hosts, workers and progress of a job."""
    files, tls = (etcd_ca, etcd_cert, etcd_key, etcd_password_file), (tls_cert, tls_key, tls_ca)
    told = _asked(job, etcd, secret_file, {"what": "status"}, files, tls)
    if as_json:
        print(json.dumps(told))
        return
    console = Console(markup=False, emoji=False)
    console.print(f"{job}: {told['phase']}, epoch {told['epoch']}, step {told['step']}, {told['layout']}; {told['incidents']} incidents")
    table = Table("host", "rack", "room", "workers", "spares", "")
    for host in told["hosts"]:
        marks = [*(["coordinates"] if host["name"] == told["coordinator"] else []), *(["is drained"] if host["draining"] else [])]
        workers, spares = (" ".join(map(str, host[kind])) for kind in ("workers", "spares"))
        table.add_row(host["name"], host["rack"] or "", str(host["room"]), workers, spares, ", ".join(marks))
    console.print(table)
    console.print(_copies(told))


def _copies(told: dict[str, Any]) -> str:
    """Returns how many copies of the state there are, and where."""
    kept, wanted = told["copies_kept"], told["copies_wanted"]
    several = (kept or 0) > 2 and told["copies"] in ("other racks", "other hosts")
    where = _APART if several else _COPIES[told["copies"]]
    if kept == wanted and (kept is None or kept == 2):
        return f"second copies of the state: {where}"
    if kept == wanted:
        return f"further copies of the state ({kept} cop{'y' if kept == 1 else 'ies'} in all): {where}"
    return f"further copies of the state ({kept} cop{'y' if kept == 1 else 'ies'} in all, and {wanted} are wanted): {where}"


def scale(
    job: Job,
    workers: Annotated[int, typer.Argument(help="How many workers the job should have, on all hosts together.")],
    etcd: Etcd = None,
    secret_file: Secret = None,
    etcd_ca: File = None,
    etcd_cert: File = None,
    etcd_key: File = None,
    etcd_password_file: File = None,
    tls_cert: File = None,
    tls_key: File = None,
    tls_ca: File = None,
) -> None:
    """Changes the number of workers, at a step boundary; no step is taken again."""
    request = {"what": "scale", "workers": workers}
    _say(_asked(job, etcd, secret_file, request, (etcd_ca, etcd_cert, etcd_key, etcd_password_file), (tls_cert, tls_key, tls_ca)))


def drain(
    job: Job,
    host: Annotated[str, typer.Argument(help="The host's name, as `elastic status` shows it.")],
    etcd: Etcd = None,
    secret_file: Secret = None,
    etcd_ca: File = None,
    etcd_cert: File = None,
    etcd_key: File = None,
    etcd_password_file: File = None,
    tls_cert: File = None,
    tls_key: File = None,
    tls_ca: File = None,
) -> None:
    """Lets the other hosts take over what the workers of one host own; then its agent ends."""
    request = {"what": "drain", "host": host}
    _say(_asked(job, etcd, secret_file, request, (etcd_ca, etcd_cert, etcd_key, etcd_password_file), (tls_cert, tls_key, tls_ca)))


def kill(
    job: Job,
    worker: Annotated[int, typer.Argument(help="The worker's number, as `elastic top` shows it.")],
    etcd: Etcd = None,
    secret_file: Secret = None,
    etcd_ca: File = None,
    etcd_cert: File = None,
    etcd_key: File = None,
    etcd_password_file: File = None,
    tls_cert: File = None,
    tls_key: File = None,
    tls_ca: File = None,
) -> None:
    """Ends the process of one worker at once; the others go on as after any death, and a new worker takes its place."""
    request = {"what": "kill", "worker": worker}
    _say(_asked(job, etcd, secret_file, request, (etcd_ca, etcd_cert, etcd_key, etcd_password_file), (tls_cert, tls_key, tls_ca)))


def stop(
    job: Job,
    etcd: Etcd = None,
    secret_file: Secret = None,
    etcd_ca: File = None,
    etcd_cert: File = None,
    etcd_key: File = None,
    etcd_password_file: File = None,
    tls_cert: File = None,
    tls_key: File = None,
    tls_ca: File = None,
) -> None:
    """Stops a job at the next step boundary, where a Trainer with a checkpoint directory saves."""
    request = {"what": "stop"}
    _say(_asked(job, etcd, secret_file, request, (etcd_ca, etcd_cert, etcd_key, etcd_password_file), (tls_cert, tls_key, tls_ca)))


def _say(told: dict[str, Any]) -> None:
    print(told["said"])


def _asked(job: str, etcd: str | None, secret_file: Path | None, request: dict[str, Any], files: Files, tls: Files) -> dict[str, Any]:
    """Returns the coordinator's answer, or exits with its refusal. Nothing secret is in the arguments of a process."""
    if etcd is None or secret_file is None:
        print(f"error: {_SEVERAL.format(job=job)}", file=sys.stderr)
        raise typer.Exit(2)
    try:
        with Asker(job, etcd, secret_file, files, tls) as asker:
            return asker.ask(request)
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
