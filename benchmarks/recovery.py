"""Measures how long a killed worker stalls training: ours, TorchFT and torchrun, with the same model, data, optimizer and threads.

    python benchmarks/recovery.py --json build/recovery.json
    python benchmarks/recovery.py --peer-kills 0 --spares 1
    python benchmarks/recovery.py --kills 0 --peer-kills 0 --replication

Our side runs one job per row, with `--spares N` one without spares and one with N. It kills workers at random places at uniformly random
moments, each after the last replacement has joined. Losses and parameters must equal, bit for bit, those of the same job without kills.
The figures are those of the job's incidents.
`measured` is the same stall measured from outside, by the times at which steps were yielded; the peers' stall is measured in this way:

    stall = first commit after the recovery - kill - time that the steps up to that commit still needed without the kill

TorchFT needs `pip install '.[bench]'`; without it, its rows are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from killed import kill_ours
from measure import SEQ, BenchmarkError, Task
from peer_kills import PEERS, PeerKind, kill_peer, missing
from replication import cost_of_replication
from report import write_json
from rich.console import Console
from rich.table import Table
from throughput import machine

from elastic.errors import ElasticError
from elastic.observe.activity import RECOVERY_PHASES

_PEER_WORKERS = 4
_GAP_S = 6.0  # a replacement has joined after 2 to 4 s
_PEER = f"One of {', '.join(PEERS)}; by default all but torchft-defaults, which stalls for a minute a kill."
_WIDTH = 120
_SHOWN = {
    "stall_ms": "stall",
    "measured_stall_ms": "stall, measured from outside",
    "lost_ms": "= work since the last commit",
    "detected_ms": "+ detection",
    **{f"{phase}_ms": f"+ {phase}" for phase in RECOVERY_PHASES},
    "resume_ms": "+ until all run again",
    "slower_ms": "+ redoing that work, less the lost time",
    "micro_batches_kept": "micro-batches not redone",
    "running_ms": "running again after",
    "rejoined_ms": "a replacement trains after",
    "replaced_ms": "its first step is committed after",
}


def task_for(tokens: int, workers: int, stages: int) -> Task:
    """Returns a task with micro-batches of at most 4 samples, and at least one micro-batch per worker."""
    batch = tokens // SEQ
    return Task(workers=workers, stages=stages, batch=batch, micro_batch=max(1, min(4, batch // workers)), warm_up=3, steps=10)


def show_ours(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints a table with one column per job."""
    table = Table(title="ours: milliseconds from the kill, median (95th percentile)")
    table.add_column("")
    for row in rows:
        spares = f" + {row['spares']}" if row["spares"] else ""
        table.add_column(f"{row['workers']}{spares} workers\n{row['batch'] * SEQ} tokens", justify="right", no_wrap=True)
    for name, meaning in _SHOWN.items():
        table.add_row(meaning, *(_cell(row[name]) for row in rows))
    table.add_row("stall, 99th percentile (most)", *(_cell(row["stall_ms"], "max", "p99") for row in rows))
    table.add_row("kills of a full job", *(str(row["kills_of_a_full_job"]) for row in rows))
    table.add_row("of them replaced by a spare", *(str(sum(each["by_a_spare"] for each in row["each"])) for row in rows))
    table.add_row("steps redone", *(", ".join(f"{n} x {steps}" for steps, n in sorted(row["steps_redone"].items())) for row in rows))
    table.add_row("samples lost", *(str(row["samples_lost"]) for row in rows))
    table.add_row("equal to an undisturbed run", *("not compared" if row["equal_to_undisturbed"] is None else "yes" for row in rows))
    table.add_row("a step, undisturbed", *(f"{row['step_ms']:.0f}" for row in rows))
    table.add_row("MB moved", *("unknown" if (m := row["bytes_moved"]) is None else f"{m['median'] / 1e6:.1f}" for row in rows))
    console.print(table)


def show_peers(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=f"peers: milliseconds, median (most), {_PEER_WORKERS} workers")
    for heading in ("case", "kills", "stall", "replaced", "step before", "samples lost", "crashed"):
        table.add_column(heading, no_wrap=heading != "case")
    for row in rows:
        case = f"{row['name']}, {row['batch'] * SEQ} tokens"
        cells = [_cell(row[name], "max") for name in ("stall_ms", "replaced_ms", "step_ms")]
        table.add_row(case, str(row["kills"]), *cells, str(row["samples_lost"]), str(row["crashed"]))
    console.print(table)


def show_replication(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="tokens/s with replication and without: medians, and ratio (least to most)")
    for heading in ("case", "with", "without", "ratio"):
        table.add_column(heading)
    for row in rows:
        case = f"{row['workers']} workers in {row['stages']} stages, {row['tokens_per_step']} tokens"
        ratio = row["ratio"]
        rates = (f"{row[f'{side}_tokens_per_second']['median']:.0f}" for side in ("with", "without"))
        table.add_row(case, *rates, f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
    console.print(table)


def _cell(values: dict[str, float] | None, upper: str = "p95", middle: str = "median") -> str:
    return "unknown" if values is None else f"{values[middle]:.0f} ({values[upper]:.0f})"


def main(
    kills: Annotated[int, typer.Option(min=0, help="Kills of our side, for each number of workers and size; 0 leaves it out.")] = 20,
    peer_kills: Annotated[int, typer.Option(min=0, help="Kills of each peer, for each size; 0 leaves the peers out.")] = 4,
    workers: Annotated[list[int] | None, typer.Option(help="Workers of our side; 4 and 8 by default. The peers have 4.")] = None,
    stages: Annotated[int, typer.Option(min=1, help="Stages of our side.")] = 2,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens a step, a multiple of 1024; 4096 and 1024 by default.")] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(PEERS)}; by default all but torchft-defaults, which stalls a minute a kill."),
    ] = None,
    gap: Annotated[float, typer.Option(help="Least seconds between two kills of our side, at the pace of a job without kills.")] = _GAP_S,
    seed: Annotated[int, typer.Option(help="Seed of places and moments.")] = 0,
    spares: Annotated[int, typer.Option(min=0, help="Also run our side with so many spares.")] = 0,
    check: Annotated[bool, typer.Option(help="Also take the same steps without kills, and compare the bits.")] = True,
    replication: Annotated[bool, typer.Option("--replication", help="Also measure tokens/s with replication against without.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs of --replication.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file instead of stdout.")] = None,
) -> None:
    """Measures how long a killed worker stalls training, for ours and for peers, and what replication costs while nothing fails."""
    sizes, counts = tokens or [4096, 1024], workers or [4, 8]
    if bad := [size for size in sizes if size < 1024 or size % 1024]:
        raise typer.BadParameter(f"--tokens {bad[0]} is not a multiple of 1024, eight samples of {SEQ} tokens")
    if bad := [count for count in counts if count < max(2, stages)]:
        raise typer.BadParameter(f"--workers {bad[0]}: nothing survives with fewer than 2, and each of --stages {stages} needs one")
    if peer and (strange := set(peer).difference(PEERS)):
        raise typer.BadParameter(f"--peer {strange.pop()}: use one of {', '.join(PEERS)}")
    progress = Console(stderr=True, highlight=False, markup=False)
    options = {"kills": kills, "peer_kills": peer_kills, "gap_s": gap, "seed": seed, "rounds": rounds, "spares": spares}
    report: dict[str, Any] = {"machine": machine(), "options": options, "ours": [], "peers": [], "left_out": {}, "replication": []}
    chosen: list[PeerKind] = [kind for kind in PEERS if (kind != "torchft-defaults" if peer is None else kind in peer) and peer_kills]
    try:
        for size in sizes:
            for count, more in [(count, more) for count in counts for more in sorted({0, spares})] if kills else ():
                progress.print(f"ours: {count} workers and {more} spares, {size} tokens, {kills} kills")
                killed = kill_ours(task_for(size, count, stages), kills, gap, seed, check=check, spares=more)
                report["ours"].append(killed.to_json())
            for kind in chosen:
                _run_peer(kind, size, peer_kills, seed, report, progress)
            for count in counts if replication else ():
                report["replication"].append(cost_of_replication(task_for(size, count, stages), rounds, progress).to_json())
    except (BenchmarkError, ElasticError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    shown = Console(highlight=False, markup=False, width=max(_WIDTH, progress.width))
    for rows, show in ((report["ours"], show_ours), (report["peers"], show_peers), (report["replication"], show_replication)):
        if rows:
            show(rows, shown)
    for name, why in report["left_out"].items():
        shown.print(f"left out: {name}: {why.splitlines()[0]}")
    if json_file is None:
        print(json.dumps(report))
    write_json(json_file, report)


def _run_peer(kind: PeerKind, size: int, kills: int, seed: int, report: dict[str, Any], progress: Console) -> None:
    """Adds the peer's row to the report, or the reason for leaving it out: a failing peer does not end the benchmark."""
    why = missing(kind)
    if why is None:
        progress.print(f"{PEERS[kind]}: {_PEER_WORKERS} workers, {size} tokens, {kills} kills")
        try:
            report["peers"].append(kill_peer(kind, task_for(size, _PEER_WORKERS, 1), kills, seed).to_json())
            return
        except BenchmarkError as error:
            why = str(error)
    progress.print(f"{PEERS[kind]}, {size} tokens, is left out: {why}")
    report["left_out"][f"{kind}, {size} tokens"] = why


if __name__ == "__main__":
    typer.run(main)
