"""Decides whether a host is fit for a job, from what was measured on it: pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic.agent.link_probes import LinkReport, Way
from elastic.errors import ElasticError, HostRefused, HostUnfit

SLOW = 5.0
"""A host that takes so many times the processor time of the coordinator's is refused: its workers would be excluded as crawling."""

TRIES = 3
"""So many times a host is measured before it is refused for what may pass."""

TRY_AGAIN_S = 1.0
"""The time between two of them."""

_SLOW_LINK = 10e6
_STEAL = 0.5
_ADVICE = {
    "torch": "install the same torch on every host",
    "python": "use the same Python on every host",
    "machine": "a job has processors of one kind",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What was measured on a host; None is unknown.

    `links` are those to other agents, by name. `product` is the digest of a fixed product of matrices and `seconds` its processor time;
    `broken` is why there is none. `available` bytes of memory are free for workers. `steal` is the part of the processors' time that other
    machines took. `disk` is why its run directory cannot be written.
    """

    links: Mapping[str, LinkReport] = field(default_factory=dict)
    product: str | None = None
    seconds: float | None = None
    fingerprint: Mapping[str, str] | None = None
    broken: str = ""
    available: int | None = None
    steal: float | None = None
    disk: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HostReport:
        links = {
            name: LinkReport(there=Way(**each["there"]), back=None if each["back"] is None else Way(**each["back"]))
            for name, each in data["links"].items()
        }
        return cls(**{**data, "links": links})


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a job demands: the coordinator's own `product`, `seconds` and `fingerprint`, and the least bytes that one worker needs."""

    product: str | None = None
    seconds: float | None = None
    fingerprint: Mapping[str, str] | None = None
    worker_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfit:
    """Why a host is refused: `reason`, with what was measured and what to do; `kind` is the error with which it ends.

    What is `passing` may be gone in a second, such as a burst of work on its hardware: the host is measured again before it is refused.
    """

    reason: str
    kind: type[ElasticError] = HostUnfit
    passing: bool = False


def unfit(report: HostReport, demand: Demand, name: str, room: int, present: Collection[str]) -> Unfit | None:
    """Returns why the host `name` with room for `room` workers is refused, None if it is fit. Links to hosts that are not `present` any
    more do not count."""
    for check in (_fingerprint, _product, _speed, _memory):
        found = check(report, demand, room)
        if found is not None:
            return found
    if report.disk:
        return Unfit(reason=f"its run directory cannot be written: {report.disk}")
    broken = [text for other, link in sorted(report.links.items()) if other in present and (text := broken_link(name, other, link))]
    if broken:
        advice = "let every host reach every port of the others, in both directions, or choose another network with --interface"
        return Unfit(reason=f"{'; '.join(broken)}: {advice}")
    return None


def warnings(report: HostReport) -> list[str]:
    """Returns what is strange about a host, and no reason to refuse it."""
    slow = sorted(
        (way.rate, f"the link {direction} host {other} passes only {speed(way)}")
        for other, link in report.links.items()
        for direction, way in (("to", link.there), ("from", link.back))
        if way is not None and way.rate is not None and way.rate < _SLOW_LINK
    )
    links = [
        sentence + (f", and {len(slow) - 1} more pass less than {_SLOW_LINK / 1e6:g} MB/s" if slow[1:] else "") for _, sentence in slow[:1]
    ]
    stolen = [f"other machines on its hardware take {report.steal:.0%} of its processors"] if (report.steal or 0.0) > _STEAL else []
    return links + stolen


def broken_link(name: str, other: str, link: LinkReport) -> str:
    """Returns what is wrong with a link, naming both hosts; an empty text if nothing is."""
    if link.there.why:
        return f"host {name} cannot reach host {other}: {link.there.why}"
    if link.back is None or not link.back.why:
        return ""
    return f"host {other} cannot reach host {name}: {link.back.why} (in the other direction {speed(link.there)} get through)"


def speed(way: Way | None) -> str:
    """Returns a speed as text."""
    return "nothing" if way is None or way.rate is None else f"{way.rate / 1e6:,.0f} MB/s"


def _fingerprint(report: HostReport, demand: Demand, _room: int) -> Unfit | None:
    if report.fingerprint is None or demand.fingerprint is None:
        return None
    for what, wanted in demand.fingerprint.items():
        have = report.fingerprint.get(what, "")
        if have != wanted:
            advice = _ADVICE.get(what, "bits depend on it; found the job with isa='avx2' if its hosts differ")
            return Unfit(reason=f"its {what} is {have}, and the job's {wanted}: {advice}", kind=HostRefused)
    return None


def _product(report: HostReport, demand: Demand, _room: int) -> Unfit | None:
    if report.broken:
        return Unfit(reason=f"a test product of matrices failed there: {report.broken}; its processor or memory may be faulty")
    if report.product is None or demand.product is None or report.product == demand.product:
        return None
    return Unfit(
        reason=f"its processor computes other bits: a test product of matrices has the digest {report.product[:12]}, and "
        f"{demand.product[:12]} on the host that coordinates the job. It is of another kind (found the job with isa='avx2' or 'default'), "
        "or one of the two is faulty"
    )


def _speed(report: HostReport, demand: Demand, _room: int) -> Unfit | None:
    if report.seconds is None or not demand.seconds or report.seconds < SLOW * demand.seconds:
        return None
    return Unfit(
        reason=f"its processor is {report.seconds / demand.seconds:.1f} times as slow as that of the host that coordinates the job "
        f"({report.seconds * 1e3:.1f} ms of processor time for a test product, and {demand.seconds * 1e3:.1f} ms): check its clock, its "
        "temperature and its limits",
        passing=True,
    )


def _memory(report: HostReport, demand: Demand, room: int) -> Unfit | None:
    needed = demand.worker_bytes * room
    if report.available is None or report.available >= needed:
        return None
    have = f"{report.available / 1e6:,.0f} MB are free there"
    return Unfit(
        reason=f"{room} worker{'s' * (room != 1)} of this job need {needed / 1e6:,.0f} MB at least, and {have}: start fewer, or free memory"
    )
