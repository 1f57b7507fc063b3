"""Decides the first view of a job, as a pure function of its workers' announcements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic.errors import MismatchError
from elastic.layout.regions import ModelSpec
from elastic.plan.eager import as_eager_as_fits
from elastic.plan.fleet import Fleet
from elastic.plan.job_costs import JobCosts
from elastic.plan.planner import given, plan
from elastic.plan.saved import SavedPlan
from elastic.plan.site import LinkSpeed, Site, pair
from elastic.plan.workload import Workload, costs
from elastic.script.sources import changed
from elastic.view import Member, View, laid_out

_EQUAL = ("fingerprint", "model", "settings", "micro_batches", "grains", "digest", "checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The announcement of a worker that can be a member. `profile` has the fields of `elastic.plan.workload.LayerCost` for each layer.

    Its device does `peak_flops` operations a second at most (0: unknown, or not measured). `state_bytes` is the optimizer's state for one
    parameter element. The process may use `memory` bytes (None: its share of the host's);
    it uses `base` of them before it holds a layer, and `whole` with the whole model, as a spare does. `link` is
    `[latency_s, bytes_per_s]` of a message within its host, if measured. It may use `device_memory` bytes of its device, if it has one.
    `checkpoint` names the checkpoint that a founder would resume from. `code` holds the user's modules, in the form of
    `elastic.script.sources.to_json`.
    """

    host: str
    address: str
    fingerprint: dict[str, Any]
    model: dict[str, Any]
    digest: str
    micro_batches: int
    grains: int
    settings: dict[str, Any]
    state_bytes: float = 0.0
    profile: list[list[float]] | None = None
    peak_flops: float = 0.0
    link: list[float] | None = None
    memory: int | None = None
    base: int = 0
    whole: int = 0
    segment: bool = False
    device: str = "cpu"
    device_memory: int | None = None
    checkpoint: str | None = None
    code: dict[str, list[Any]] = field(default_factory=dict)

    def member(self, worker: int) -> Member:
        """Returns the worker as a member of a view."""
        return Member(
            worker=worker,
            host=self.host,
            address=self.address,
            memory=self.memory,
            base=self.base,
            segment=self.segment,
            device=self.device,
            device_memory=self.device_memory,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns all fields, of JSON types: `Ready(**...)` is equal."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], host: str, memory: int | None = None) -> Ready:
        """Builds it from a worker's message. Raises MismatchError if a field is missing or unknown."""
        try:
            return cls(host=host, memory=memory, **data)
        except TypeError as error:
            raise MismatchError(f"a worker's announcement does not match the fields that this version expects: {error}") from error


def found(
    ready: Mapping[int, Ready], stages: int | None, site: Site | None = None, saved: SavedPlan | None = None, *, eager: bool = False
) -> View:
    """Returns epoch 1 with all ready workers as members; `site` describes the hosts, and the workers' measured links are added to it.

    The plan is the planner's, or the `saved` one, with an `eager` schedule if that is asked for and fits into memory. Raises MismatchError
    if the workers differ, PlanError if the model does not fit the stages or the memory, or if the saved plan is for another job.
    """
    check_equal(ready)
    first = ready[min(ready)]
    profile = next((worker.profile for _, worker in sorted(ready.items()) if worker.profile is not None), None)
    if profile is None:
        raise MismatchError(f"none of the workers {sorted(ready)} measured its layers, which the plan needs")
    state_bytes = max(each.state_bytes for each in ready.values())
    workload = Workload(
        layers=costs(profile),
        micro_batches=first.micro_batches,
        grains=first.grains,
        state_bytes=state_bytes,
        peak_flops=max(each.peak_flops for each in ready.values()),
    )
    links = {
        pair(each.host, each.host): LinkSpeed(latency_s=each.link[0], bytes_per_s=each.link[1]) for each in ready.values() if each.link
    }
    known = (site or Site()).knowing(links)
    members = tuple(ready[worker].member(worker) for worker in sorted(ready))
    fleet = Fleet.of(members, known)
    chosen = plan(fleet, workload, stages=stages).plan if saved is None else given(saved, fleet, workload)
    chosen = as_eager_as_fits(chosen, JobCosts(workload, fleet)) if eager else chosen
    cut = [(stage.layers, stage.members) for stage in chosen.stages]
    layout = laid_out(ModelSpec.from_json(first.model), cut, members, known)
    return View(epoch=1, attempt=0, members=members, plan=chosen, layout=layout, workload=workload, site=known)


def strangers(ready: Mapping[int, Ready], home: str) -> dict[str, str]:
    """Returns, for each host whose workers have imported another text of a module than those of the host `home`, the module's file."""
    own = next((ready[worker].code for worker in sorted(ready) if ready[worker].host == home), {})
    files = [(each.host, changed(each.code, own)) for each in ready.values() if each.host != home]
    return {host: file for host, file in files if file is not None}


def another_file(file: str) -> str:
    """Returns why a host is refused whose workers have imported another text of this file than the job's."""
    return f"its {file} is not the file that the job began with: copy the same file to every host"


def check_equal(ready: Mapping[int, Ready]) -> None:
    """Raises MismatchError naming the workers that differ from the lowest one, and their first difference."""
    reference = min(ready)
    _check_code(ready, reference)
    for name in _EQUAL:
        expected = getattr(ready[reference], name)
        others = [worker for worker in sorted(ready) if getattr(ready[worker], name) != expected]
        if others:
            found = getattr(ready[others[0]], name)
            place, here, there = first_difference(name, expected, found)
            raise MismatchError(
                f"worker{'s' * (len(others) > 1)} {', '.join(map(str, others))} cannot train together with worker {reference}: "
                f"{place} is {_short(there)} there and {_short(here)} on worker {reference}; {_ADVICE[name]}"
            )


def _check_code(ready: Mapping[int, Ready], reference: int) -> None:
    for worker in sorted(ready):
        if (path := changed(ready[reference].code, ready[worker].code)) is None:
            continue
        here, there = ready[reference].host, ready[worker].host
        if here != there:
            raise MismatchError(
                f"hosts {here} and {there} cannot train together: {path} differs between them; copy the same file to every host, and start "
                "the job again"
            )
        raise MismatchError(
            f"worker {worker} cannot train together with worker {reference}: {path} was edited after worker {reference} had imported "
            "it, so their code differs; restore the old text while the job runs, or start the job again"
        )


def first_difference(place: str, here: Any, there: Any) -> tuple[str, Any, Any]:
    """Returns the place where two unequal JSON values differ first, such as `settings.batch_size` or `model.layers[2]`, and both values."""
    if isinstance(here, dict) and isinstance(there, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            if here.get(key) != there.get(key):
                return first_difference(f"{place}.{key}", here.get(key), there.get(key))
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        for index, (one, other) in enumerate(zip(here, there, strict=True)):
            if one != other:
                return first_difference(f"{place}[{index}]", one, other)
    return place, here, there


_ADVICE = {
    "fingerprint": "run the same torch and Python on processors of one kind, or fix isa=",
    "settings": "give the Trainer the same arguments on every worker",
    "micro_batches": "give the Trainer the same arguments on every worker",
    "grains": "give the Trainer the same arguments on every worker",
    "model": "build the same model, with the same initial values, on every worker",
    "checkpoint": "the newest one must be the same for all: put the directory on storage that all hosts share",
    "digest": "seed the initial weights alike, and read no randomness that differs between workers, before making the Trainer",
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
