"""The command `elastic doctor`: examines this machine, an etcd, and the way to a job's hosts, before a job needs them."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from elastic.agent.fitness import TRIES, TRY_AGAIN_S, Demand, HostReport, Unfit, unfit
from elastic.errors import ElasticError
from elastic.host.measures import Steal, available_bytes
from elastic.host.process import module_command
from elastic.launch.examine import ERROR, OK, WARNING, Finding, computed, machine
from elastic.launch.sharing import interface_of, key_of, read_credentials, read_secret
from elastic.membership.endpoint import EtcdEndpoint
from elastic.settings import agent_environment, best_isa

_WIDE = 200  # columns in a file or a pipe
Tls = tuple[Path | None, Path | None, Path | None]
_STYLE = {OK: "green", WARNING: "yellow", ERROR: "red"}


def doctor(
    etcd: Annotated[str | None, typer.Option(help="Examine this etcd too, as for `elastic agent`.")] = None,
    job: Annotated[str | None, typer.Option(help="Examine the way to the hosts of this job, and whether this host fits it.")] = None,
    secret_file: Annotated[Path | None, typer.Option(help="A file with the job's secret.")] = None,
    etcd_ca: Annotated[Path | None, typer.Option(help="As for `elastic agent`.")] = None,
    etcd_cert: Annotated[Path | None, typer.Option(help="As for `elastic agent`.")] = None,
    etcd_key: Annotated[Path | None, typer.Option(help="As for `elastic agent`.")] = None,
    etcd_password_file: Annotated[Path | None, typer.Option(help="As for `elastic agent`.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="As for `elastic agent`.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="As for `elastic agent`.")] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="As for `elastic agent`.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes that this host is to have.", min=1)] = 2,
    threads: Annotated[int, typer.Option(help="Threads of each.", min=1)] = 1,
    isa: Annotated[str | None, typer.Option(help="avx512, avx2 or default; by default the best of this machine.")] = None,
    interface: Annotated[str | None, typer.Option(help="This host's IP address for the others; by default that towards etcd.")] = None,
    directory: Annotated[Path | None, typer.Option(help="The run directory; by default in the temporary directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Examines this machine, and with --etcd, --job and --secret-file the way to a job. Exits with 1 if anything is an error."""
    steal, place = Steal(), directory or Path(tempfile.gettempdir())
    findings = list(machine(place, workers, threads, own_etcd=etcd is None))
    remote: dict[str, Any] = {}
    files = {"ca": etcd_ca, "cert": etcd_cert, "key": etcd_key, "password_file": etcd_password_file}
    if etcd is None and (job is not None or secret_file is not None):
        findings.append(Finding(what="job", level=ERROR, found="a job is found at its etcd", advice="give --etcd too"))
    elif etcd is not None:
        given = {name: str(path.absolute()) for name, path in files.items() if path is not None}
        try:
            remote = _asked(etcd, given, job, secret_file, (tls_cert, tls_key, tls_ca), interface, workers)
        except ElasticError as error:
            findings.append(Finding(what="arguments", level=ERROR, found=str(error)))
        findings += [Finding(**each) for each in remote.get("findings", [])]
    environment = remote.get("threads", threads), remote.get("isa") or isa or best_isa()
    found, result = computed(*environment)
    why = _unfit(remote, result, steal, workers)
    for _ in range(TRIES - 1):
        if why is not None and why.passing:
            time.sleep(TRY_AGAIN_S)
            found, result = computed(*environment)
            why = _unfit(remote, result, steal, workers)
    findings += [found, _stolen(steal)]
    if "demand" in remote:
        findings.append(_fits(why))
    _show(findings, as_json=as_json)
    raise typer.Exit(1 if any(each.level == ERROR for each in findings) else 0)


def _asked(
    etcd: str, files: dict[str, str], job: str | None, secret: Path | None, tls: Tls, interface: str | None, workers: int
) -> dict[str, Any]:
    """Returns what `agent.examining` finds. Raises SettingsError, or EtcdUnavailable if there is no way to etcd."""
    credentials = read_credentials(*tls)
    question = {
        "etcd": etcd,
        "files": files,
        "job": job,
        "secret": None if secret is None else key_of(read_secret(secret)),
        "credentials": None if credentials is None else credentials.to_json(),
        "interface": interface_of(interface, EtcdEndpoint.parse(etcd, files)),
        "workers": workers,
    }
    command = module_command("elastic.agent.examining")
    done = subprocess.run(
        command, input=json.dumps(question), capture_output=True, text=True, errors="replace", env=agent_environment(), check=False
    )
    if done.returncode:
        raise ElasticError(f"the examination of etcd failed; this is a bug:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def _stolen(steal: Steal) -> Finding:
    part = steal.part() or 0.0
    level = WARNING if part > 0.5 else OK
    advice = "steps take longer: use a machine of your own, or another size" if part > 0.5 else ""
    return Finding(what="processors taken", level=level, found=f"other machines on this hardware take {part:.0%}", advice=advice)


def _unfit(remote: dict[str, Any], result: dict[str, Any], steal: Steal, workers: int) -> Unfit | None:
    """Compares this host with the job, if there is one, as its coordinator would."""
    if "demand" not in remote:
        return None
    report = HostReport.from_json(
        HostReport(steal=steal.part(), available=available_bytes(), **result).to_json() | {"links": remote["links"]}
    )
    return unfit(report, Demand(**remote["demand"]), "here", workers, remote["agents"])


def _fits(reason: Unfit | None) -> Finding:
    if reason is None:
        return Finding(what="fits the job", level=OK, found="the job would take this host")
    found, _, advice = reason.reason.rpartition(": ")
    return Finding(what="fits the job", level=ERROR, found=found or advice, advice=advice if found else "")


def _show(findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"ok": all(each.level != ERROR for each in findings), "findings": [each.to_json() for each in findings]}))
        return
    table = Table("", "what", "found", "what to do")
    for each in findings:
        table.add_row(Text(each.level, style=_STYLE[each.level]), *map(Text, (each.what, each.found, each.advice)))
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDE
    console.print(table)
