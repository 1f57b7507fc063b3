"""Enumerates feasible plans for a fleet, ignoring the current layout.

Workers are identified only by their places in the fleet. So the result for one fleet holds for every equal-looking fleet, such as the
workers that are left after another one of several equal workers is lost.

The partition with the least bottleneck is optimal if workers never wait. They do wait where neighbouring stages have different numbers of
workers, less if micro-batches are dealt out (`dealing.py`), and less behind wide stages than behind narrow ones. So of equally good
partitions the first and the last are tried, and stages of equal time and width, and the simulated schedule decides.

Where workers differ in speed, each stage takes neighbours in the order of their speeds, the slowest or the fastest first. Where a plan does
not fit into memory, layers are divided again within these limits. Where links between hosts differ, workers are also placed by the links.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from elastic.plan.fleet import Fleet
from elastic.plan.job_costs import JobCosts
from elastic.plan.memory import refuse, shortfall
from elastic.plan.partition import StageParts, both_ways, check_feasible, partitioning
from elastic.plan.placing import placed
from elastic.plan.plan import Stage
from elastic.plan.prediction import Prediction
from elastic.plan.prepared import Prepared
from elastic.plan.routing import weighted_routes
from elastic.plan.uneven import divide, divide_within
from elastic.plan.workload import Workload

Routes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Stages and routes, their prediction, and the set that they were chosen from."""

    stages: tuple[Stage, ...]
    routes: Routes
    predicted: Prediction
    reason: str

    def renamed(self, names: Mapping[int, int]) -> Candidate:
        """Returns the candidate with other workers in the same places."""
        return replace(
            self,
            stages=tuple(stage.renamed(names) for stage in self.stages),
            routes=tuple(tuple(names[worker] for worker in route) for route in self.routes),
        )


class Question(NamedTuple):
    """A nameless fleet, its workload, and the number of stages (None: any)."""

    fleet: Fleet
    workload: Workload
    stages: int | None


def nameless(fleet: Fleet) -> Fleet:
    """Returns the same fleet with places as worker ids, and hosts named in the order of their first worker."""
    places = {worker: place for place, worker in enumerate(fleet.workers)}
    names = {host: f"{number:06}" for number, host in enumerate(dict.fromkeys(fleet.host(worker) for worker in fleet.workers))}
    return Fleet(
        workers=tuple(range(len(places))),
        slowdowns={place: fleet.slowdown(worker) for worker, place in places.items()},
        memory={places[worker]: limit for worker, limit in fleet.memory.items() if worker in places},
        hosts={place: names[fleet.host(worker)] for worker, place in places.items()},
        site=fleet.site.renamed(names),
        outlive=fleet.outlive,
        on_device=fleet.on_device,
        device_memory={places[worker]: limit for worker, limit in fleet.device_memory.items() if worker in places},
    )


def searching(question: Question) -> Generator[None, None, tuple[Candidate, ...]]:
    """Returns all candidates that fit into memory, fewer stages first; yields every few milliseconds.

    Raises PlanError, with advice, if there are more stages than layers or workers, or if nothing fits.
    """
    fleet, workload, stages = question
    costs = JobCosts(workload, fleet)
    workers = len(fleet.workers)
    most = min(len(workload.layers), workers)
    if stages is None:
        counts, reason = range(1, most + 1), f"fastest of 1 to {most}" if most > 1 else "the only number possible"
    else:
        check_feasible(len(workload.layers), workers, stages)
        counts, reason = [stages], "as asked"
    found: list[Candidate] = []
    short: list[tuple[float, str]] = []
    for count in counts:
        lacking: list[tuple[float, str]] = []
        for divisions in (_divisions, _within_memory):
            if divisions is _within_memory and not lacking:
                break
            for division in divisions(fleet, workload, count):
                yield
                if division is None:
                    continue
                order, parts = division
                filled, routes = _filled(order, parts, workload)
                yield
                lack = shortfall(workload, filled, routes, fleet)
                if lack[1]:
                    lacking.append(lack)
                else:
                    yield
                    predicted = yield from costs.predicting(filled, routes)
                    found.append(Candidate(stages=filled, routes=routes, predicted=predicted, reason=reason))
                    if (elsewhere := placed(filled, workload, fleet)) is not None:
                        routes = _routes(elsewhere, workload, fleet)
                        predicted = yield from costs.predicting(elsewhere, routes)
                        found.append(
                            Candidate(stages=elsewhere, routes=routes, predicted=predicted, reason=f"{reason}, placed by the links")
                        )
                yield
        short += lacking
    if not found:
        raise refuse(f"{stages} stages" if stages is not None else f"1 to {most} stages", min(short)[1], on_device=fleet.on_device)
    return tuple(found)


def _orders(fleet: Fleet) -> list[Fleet]:
    """Returns the workers in each order in which they may fill the stages."""
    if fleet.equal:
        return [fleet]
    return [fleet.ordered(sorted(fleet.workers, key=lambda worker: sign * fleet.slowdown(worker))) for sign in (1, -1)]


def _divisions(fleet: Fleet, workload: Workload, count: int) -> Iterator[tuple[Fleet, StageParts] | None]:
    """Yields an order of workers, and per stage its layers and number of workers; None where the search may pause."""
    for order in _orders(fleet):
        parts = _partitions(workload, len(order.workers), count) if fleet.equal else [divide(workload, order, count)]
        yield from (None if each is None else (order, each) for each in parts)


def _within_memory(fleet: Fleet, workload: Workload, count: int) -> Iterator[tuple[Fleet, StageParts]]:
    """Yields the same as `_divisions`, within the workers' memory."""
    for order in _orders(fleet):
        parts = divide_within(workload, order, count)
        if parts is not None:
            yield order, parts


def _partitions(workload: Workload, workers: int, count: int) -> Generator[StageParts | None, None, None]:
    """Yields the partition with the least bottleneck; of equal ones the first and the last, which differ in where stages are wide; and, if
    different, the one into stages of equal time with equal numbers of workers.

    Yields None where the search may pause.
    """
    least, mirrored = yield from both_ways(workload, workers, count)
    yield least
    if mirrored != least:
        yield mirrored
    equally = yield from partitioning(workload, count, count)
    balanced = [layers for layers, _ in equally]
    seconds = [sum(workload.layers[layer].forward_s + workload.layers[layer].backward_s for layer in layers) for layers in balanced]
    longest_first = sorted(range(count), key=lambda stage: -seconds[stage])
    widths = {stage: workers // count + (place < workers % count) for place, stage in enumerate(longest_first)}
    equal = tuple((layers, widths[stage]) for stage, layers in enumerate(balanced))
    if equal not in (least, mirrored):
        yield equal


def _filled(fleet: Fleet, parts: StageParts, workload: Workload) -> tuple[tuple[Stage, ...], Routes]:
    """Returns the stages with their workers, and the routes."""
    rest = iter(fleet.workers)
    stages = tuple(Stage(layers=layers, members=tuple(next(rest) for _ in range(share))) for layers, share in parts)
    return stages, _routes(stages, workload, fleet)


def _routes(stages: Iterable[Stage], workload: Workload, fleet: Fleet) -> Routes:
    return tuple(weighted_routes(workload.grains, stage.members, fleet.slowdowns) for stage in stages)


def preparing(fleets: Iterable[Fleet], workload: Workload, stages: int | None) -> Prepared[Question, tuple[Candidate, ...]]:
    """Prepares searches for fleets that may come up; equal-looking ones are searched for once."""
    return Prepared((asking(fleet, workload, stages) for fleet in fleets), searching)


def asking(fleet: Fleet, workload: Workload, stages: int | None) -> Question:
    """Returns the question for a fleet, with at most as many stages as it has workers."""
    return Question(nameless(fleet), workload, asked(fleet, stages))


def asked(fleet: Fleet, stages: int | None) -> int | None:
    """Returns the number of stages that a job asks for, at most the number of workers."""
    return None if stages is None else min(stages, len(fleet.workers))
