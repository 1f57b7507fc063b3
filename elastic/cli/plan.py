"""`elastic plan`: the best plan for a job on this machine, or for a cluster and a workload from files."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from elastic.errors import ElasticError, PlanError

_TARGET = "A train function, path.py:function or module:function, to plan for on this machine; its layers are measured here."
_CLUSTER = "TOML or JSON: kinds, hosts, links (see examples/clusters)."
_WORKLOAD = "TOML or JSON: batch, and profiles or a transformer (see examples/clusters)."
_JOB = "Planning a job"
_FILES = "Planning for a cluster"


def plan(
    target: Annotated[str | None, typer.Argument(help=_TARGET)] = None,
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments after the job: JSON values, or plain strings.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes.", rich_help_panel=_JOB)] = 2,
    stages: Annotated[int | None, typer.Option(help="Pipeline stages; by default the fastest number.", rich_help_panel=_JOB)] = None,
    threads: Annotated[int, typer.Option(help="Threads of one worker's operators.", rich_help_panel=_JOB)] = 1,
    isa: Annotated[str | None, typer.Option(help="As for `elastic run`.", rich_help_panel=_JOB)] = None,
    seed: Annotated[int, typer.Option(help="As for `elastic run`.", rich_help_panel=_JOB)] = 0,
    cluster: Annotated[Path | None, typer.Option(help=_CLUSTER, rich_help_panel=_FILES)] = None,
    workload: Annotated[Path | None, typer.Option(help=_WORKLOAD, rich_help_panel=_FILES)] = None,
    lose: Annotated[
        list[str] | None, typer.Option(help="Also plan for the loss of this HOST or HOST/WORKER. Repeatable.", rich_help_panel=_FILES)
    ] = None,
    horizon: Annotated[int, typer.Option(help="Steps over which a migration must pay off.", rich_help_panel=_FILES)] = 1000,
    batch: Annotated[int | None, typer.Option(help="Samples a step, instead of the workload's.", rich_help_panel=_FILES)] = None,
    interpolate: Annotated[bool, typer.Option("--interpolate", help="Estimate missing profiles by FLOPS.", rich_help_panel=_FILES)] = False,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Also try stages of two device kinds; the search takes longer.", rich_help_panel=_FILES)
    ] = False,
    svg: Annotated[Path | None, typer.Option(help="Draw one step into this SVG file.", rich_help_panel=_FILES)] = None,
    energy: Annotated[
        Path | None, typer.Option(help="Clocks of kinds of devices, TOML or JSON: also show what they give.", rich_help_panel=_FILES)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the plan to this TOML file, for `elastic run --plan`.")] = None,
) -> None:
    """Prints the best plan, stage by stage: for a train function on this machine, or for a cluster and a workload from files."""
    from elastic.plan import saved

    try:
        if target is None and cluster is not None and workload is not None:
            shown = _planned(cluster, workload, lose or [], horizon, batch, svg, energy, interpolate=interpolate, mixed=mixed)
        elif target is not None and cluster is None and workload is None:
            shown = _of_job(target, args or [], workers=workers, stages=stages, threads=threads, isa=isa, seed=seed)
        else:
            raise PlanError("give either a train function to plan for on this machine, or --cluster and --workload")
        if save is not None:
            saved.save(saved.SavedPlan.from_json(shown["plan"]), save)
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(shown))
        return
    console = Console(markup=False, emoji=False)
    if target is not None:
        _show_job(console, shown, target)
    else:
        _show_all(console, shown, f"{cluster and cluster.name}, {workload and workload.name}", lose or [], svg)
    if save is not None:
        console.print(f"saved to {save}")


def _of_job(target: str, words: list[str], **settings: Any) -> dict[str, Any]:
    from elastic.launch.plan_job import find

    return find(target, args=[argument(word) for word in words], **settings)


def argument(text: str) -> Any:
    """Returns an argument of a train function: the JSON value of the text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _show_job(console: Console, shown: dict[str, Any], target: str) -> None:
    table = Table(title=f"{target}: {shown['step_s']:.4g} s a step")
    for heading in ("stage", "layers", "workers (grains)", "s computing", "memory"):
        table.add_column(heading, overflow="fold")
    for number, stage in enumerate(shown["stages"]):
        mark = " (bottleneck)" if number == shown["bottleneck_stage"] else ""
        start, stop = stage["layers"]
        members = ", ".join(f"{place} ({grains})" for place, _, grains in stage["members"])
        memory = _of(stage["memory_bytes"], stage["memory_limit_bytes"])
        if stage["device_memory_bytes"]:
            memory = f"device {_of(stage['device_memory_bytes'], stage['device_memory_limit_bytes'])}, host {memory}"
        table.add_row(f"{number}{mark}", f"{start}-{stop - 1}", members, f"{stage['busy_s']:.4g}", memory)
    console.print(table)
    console.print(shown["why"])


def _of(bytes_: float, limit: float | None) -> str:
    return f"{bytes_ / 2**20:.0f} MiB" + ("" if limit is None else f" of {limit / 2**20:.0f}")


def _show_all(console: Console, shown: dict[str, Any], title: str, lose: list[str], svg: Path | None) -> None:
    _show(console, shown, title)
    if "after" in shown:
        _show(console, shown["after"], f"without {', '.join(lose)}")
        _show_change(console, shown["after"])
    if "energy" in shown:
        from elastic.cli.energy import show_frontier

        console.print(shown["energy"]["why"])
        show_frontier(console, shown["energy"]["frontier"])
    if "drawn_step_s" in shown:
        console.print(
            f"{svg}: one step simulated event by event, {shown['drawn_step_s']:.4g} s; the time in the table is the search's estimate, "
            "which sums up the stages' times"
        )


def _planned(
    cluster: Path,
    workload: Path,
    lose: list[str],
    horizon: int,
    batch: int | None,
    svg: Path | None,
    energy: Path | None,
    *,
    interpolate: bool,
    mixed: bool,
) -> dict[str, Any]:
    from elastic.plan import files
    from elastic.plan.deploy import lost
    from elastic.plan.division.search import SearchLimits
    from elastic.plan.replan import after_loss, plan_for

    if horizon < 1 or (batch is not None and batch < 1):
        raise PlanError(f"--horizon {horizon} and --batch {batch} must be at least 1")
    there = files.cluster(cluster)
    work = files.work(workload, there, interpolate=interpolate)
    samples, limits = batch or work.batch, SearchLimits(mixed=mixed)
    started = time.perf_counter()
    first = plan_for(there, work.profiles, samples, limits)
    shown = _described(first, time.perf_counter() - started)
    last = first
    if lose:
        gone = set().union(*(lost(there, what) for what in lose))
        started = time.perf_counter()
        then = after_loss(first, gone, samples, limits, horizon)
        last = then.deployed
        shown["after"] = _described(last, time.perf_counter() - started) | _change(then, sorted(map(str, gone)))
    if svg is not None:
        shown["drawn_step_s"] = _draw(last, svg)
    if energy is not None:
        shown["energy"] = _energy(last, energy)
    return shown | {"plan": last.saved().to_json()}


def _described(deployed: Any, search_s: float) -> dict[str, Any]:
    plan, prediction, pools = deployed.division, deployed.prediction, deployed.rules.pools
    stages = []
    for number, stage in enumerate(plan.stages):
        capacity = min(deployed.cluster.kinds[pools[shape.pool].kind].memory_bytes for shape in stage.makeup.shapes)
        stages.append(
            {
                "layers": [stage.layers.start, stage.layers.stop],
                "replicas": [[pools[shape.pool].kind, pools[shape.pool].zone, shape.tp, count] for shape, count in stage.makeup.parts],
                "micro_batch_s": prediction.stage_s[number],
                "memory_bytes": prediction.stage_bytes[number],
                "memory_limit_bytes": capacity,
                "devices": [str(device) for device in deployed.stage(number)],
            }
        )
    return {
        "step_s": prediction.step_s,
        "search_s": search_s,
        "micro_batch": plan.micro_batch,
        "micro_batches": plan.micro_batches,
        "replicas": plan.replicas,
        "sync_s": prediction.exchange_s,
        "update_s": prediction.update_s,
        "bottleneck_stage": prediction.bottleneck,
        "stages": stages,
        "idle_devices": [str(device) for device in deployed.idle],
        "summary": plan.summary(pools),
        "why": deployed.plan.why,
    }


def _change(then: Any, gone: list[str]) -> dict[str, Any]:
    move = then.move
    sends: dict[tuple[str, str], int] = {}
    for send in move.transfers.sends:
        ends = str(move.senders[send.source]), str(move.senders[send.destination])
        sends[ends] = sends.get(ends, 0) + send.piece.stop - send.piece.start
    return {
        "lost": gone,
        "kept_bytes": move.kept_bytes,
        "moved_bytes": move.moved_bytes,
        "moving_s": move.transfers.finish_s,
        "transfers": [[source, destination, size] for (source, destination), size in sorted(sends.items())],
        "horizon_steps": then.horizon,
        "over_horizon_s": then.over_horizon_s,
        "stay_step_s": then.stay_s,
        "stay_over_horizon_s": then.stay_over_horizon_s,
    }


def _energy(deployed: Any, path: Path) -> dict[str, Any]:
    """Returns the frontier of seconds and joules, and the clocks that save energy without slower steps."""
    from elastic.plan import clock_files
    from elastic.plan.clock_search import choose
    from elastic.plan.cluster_clocks import clocks_of

    search = clocks_of(deployed.division, deployed.rules, clock_files.load(path))
    if not any(search.choices):
        raise PlanError(f"{path}: it has the clocks of no kind of device that the plan uses")
    plan = choose("energy", search.steps, search.choices, unit="")
    frontier = [{"step_s": each.step_s, "joules": each.joules, "clocks_mhz": list(each.clocks)} for each in search.frontier()]
    return {"why": plan.why, "clocks": list(plan.chosen.clocks), "joules": plan.chosen.joules, "frontier": frontier}


def _draw(deployed: Any, path: Path) -> float:
    """Draws one step and returns its time in seconds."""
    from elastic.plan import gantt, picture

    line, shown = picture.timeline(deployed.division, deployed.rules)
    which = "" if shown == deployed.division.replicas else f", the first of {deployed.division.replicas} equal pipelines"
    try:
        path.write_text(gantt.svg(line, f"{deployed.division.summary(deployed.rules.pools)}{which}"), encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path} cannot be written: {error.strerror}") from error
    return line.end_s


def _show(console: Console, shown: dict[str, Any], title: str) -> None:
    table = Table(title=f"{title}: {shown['step_s']:.4g} s a step, found in {1000 * shown['search_s']:.0f} ms")
    for heading in ("stage", "layers", "replicas x kind / tp", "s a micro-batch", "memory", "devices"):
        table.add_column(heading, overflow="fold")
    for number, stage in enumerate(shown["stages"]):
        makeup = ", ".join(f"{count} x {kind} / {tp} in {zone}" for kind, zone, tp, count in stage["replicas"])
        memory = f"{stage['memory_bytes'] / 2**30:.1f} of {stage['memory_limit_bytes'] / 2**30:.0f} GiB"
        mark = " (bottleneck)" if number == shown["bottleneck_stage"] else ""
        start, stop = stage["layers"]
        table.add_row(f"{number}{mark}", f"{start}-{stop - 1}", makeup, f"{stage['micro_batch_s']:.4g}", memory, _hosts(stage["devices"]))
    console.print(table)
    console.print(
        f"{shown['micro_batches']} micro-batches of {shown['micro_batch']} through each of {shown['replicas']} pipelines; {shown['why']}"
    )
    if shown["idle_devices"]:
        console.print(f"not used: {_hosts(shown['idle_devices'])}")


def _hosts(names: list[str]) -> str:
    """Formats devices by host, such as `a/0,1 b/3`."""
    found: dict[str, list[str]] = {}
    for name in names:
        host, _, index = name.rpartition("/")
        found.setdefault(host, []).append(index)
    return " ".join(f"{host}/{','.join(indices)}" for host, indices in found.items())


def _show_change(console: Console, after: dict[str, Any]) -> None:
    moved, kept = after["moved_bytes"] / 1e9, after["kept_bytes"] / 1e9
    console.print(f"{moved:.3g} GB move in {after['moving_s']:.3g} s, {kept:.3g} GB are where they are needed")
    if after["stay_step_s"] is None:
        console.print("without a migration some stage would have no devices")
    else:
        console.print(
            f"the previous plan, without the lost parts, takes {after['stay_step_s']:.4g} s a step: "
            f"{after['stay_over_horizon_s']:.4g} s over {after['horizon_steps']} steps; the new plan takes {after['over_horizon_s']:.4g} s"
        )
