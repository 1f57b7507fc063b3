"""Measures what replication costs while nothing fails: runs the same job with and without it, in pairs."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from typing import Any

from measure import SEQ, BenchmarkError, Measurement, Task, run_ours
from rich.console import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Pairs of adjacent runs, with replication and without."""

    task: Task
    pairs: list[tuple[Measurement, Measurement]]

    @property
    def ratios(self) -> list[float]:
        """Ratios of tokens per second with replication to those without."""
        return [without.median_s / replicated.median_s for replicated, without in self.pairs]

    def to_json(self) -> dict[str, Any]:
        tokens = self.task.batch * SEQ
        rates = [[tokens / run.median_s for run in side] for side in zip(*self.pairs, strict=True)]
        return {
            "workers": self.task.workers,
            "stages": self.task.stages,
            "tokens_per_step": tokens,
            "with_tokens_per_second": _range(rates[0]),
            "without_tokens_per_second": _range(rates[1]),
            "ratio": _range(self.ratios),
            "rounds": [[run.to_json() for run in pair] for pair in self.pairs],
        }


def _range(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cost_of_replication(task: Task, rounds: int, console: Console) -> Cost:
    """Runs with, without, without, with and so on. Raises BenchmarkError if the losses differ."""
    pairs: list[tuple[Measurement, Measurement]] = []
    for number in range(rounds):
        load = os.getloadavg()[0]
        found: dict[str, Measurement] = {}
        for train in ("train", "train_without_replication")[:: 1 if number % 2 == 0 else -1]:
            found[train] = run_ours(task, train)
        pair = found["train"], found["train_without_replication"]
        if pair[0].losses != pair[1].losses:
            raise BenchmarkError(f"replication has changed the losses: {pair[0].losses} and {pair[1].losses}")
        pairs.append(pair)
        where = f"replication, {task.workers} workers, {task.batch * SEQ} tokens, round {number + 1} of {rounds}"
        console.print(f"{where}: ratio {pair[1].median_s / pair[0].median_s:.3f}, at load {load:.1f}", soft_wrap=True)
    return Cost(task=task, pairs=pairs)
