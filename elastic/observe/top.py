"""The table of `elastic top`: how a job stands, from the JSON of `elastic.agent.live`. Pure: it formats values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elastic.observe.incident import counted

_HEAD = 7  # lines besides workers, links and events
_EVENTS, _LINKS = 5, 4
_OLD_S = 3.0
_SLOW = 1.3  # so many times the median step is worth a look


def shown(live: Mapping[str, Any], events: Sequence[str], height: int = 0, *, now: float | None = None) -> RenderableType:
    """Returns what fits into `height` lines; all of it for 0. Of many workers, those that need attention come first. `now` is the time of
    day, None if the job has ended."""
    events = [*events][-_EVENTS:]
    links = _links(live, _LINKS if height else len(live["links"]))
    room = max(3, height - _HEAD - len(events) - len(links) - 2 * len(live["hosts"][1:2])) if height else len(live["workers"])
    parts: list[RenderableType] = [*_head(live, now), _hosts(live), _workers(live, room, ended=now is None)]
    parts += [Text(line, no_wrap=True, overflow="ellipsis") for line in links]
    parts += [Text(line, no_wrap=True, overflow="ellipsis", style="dim") for line in events]
    return Group(*parts)


def _head(live: Mapping[str, Any], now: float | None) -> list[RenderableType]:
    age = "" if now is None or now - live["at"] < _OLD_S else f" (as of {now - live['at']:.0f} s ago)"
    phase = "has ended" if now is None else live["phase"]
    step = "no step yet" if live["step"] is None else f"step {live['step'] + 1:,} of {live['of']:,}"
    loss = "" if live["loss"] is None else f"  loss {live['loss']:.4f}"
    rate = (
        f"{live['tokens_per_second']:,.0f} tokens/s" if live["tokens_per_second"] else f"{live['samples_per_second'] or 0:,.1f} samples/s"
    )
    pace = "" if live["seconds"] is None else f"  {live['seconds']:.3g} s a step  {rate}{_achieved(live)}"
    first = Text(f"{live['job']}: {phase}{age}", style="bold")
    memory = sum(each["memory"] or 0 for each in live["workers"])
    second = f"{step}{loss}{pace}"
    third = f"epoch {live['epoch']}  {live['layout']}  {counted(live['incidents'], 'incident')}  {size(memory)} in all"
    return [first, *(Text(line, no_wrap=True, overflow="ellipsis") for line in (second, third))]


def _achieved(live: Mapping[str, Any]) -> str:
    """Returns what is known of the operations that the model's steps do: the rate, and its share of the peak."""
    share = "" if live["mfu"] is None else f" ({live['mfu']:.1%} MFU)"
    return f"  {operations(live['flops_per_second'])}/s{share}" if live["flops_per_second"] else ""


def _hosts(live: Mapping[str, Any]) -> Text:
    counts: dict[str, int] = {}
    for each in live["workers"]:
        counts[each["host"]] = counts.get(each["host"], 0) + 1
    words = []
    for host in live["hosts"]:
        marks = [*(["coordinates"] if host["name"] == live["coordinator"] else []), *(["is drained"] if host["draining"] else [])]
        rack = f" in {host['rack']}" if host["rack"] else ""
        words.append(f"{host['name']}{rack}: {counted(counts.get(host['name'], 0), 'worker')}{', ' + ', '.join(marks) if marks else ''}")
    return Text(f"hosts: {'; '.join(words)}", no_wrap=True, overflow="ellipsis")


def _workers(live: Mapping[str, Any], room: int, *, ended: bool) -> Table:
    stages = {worker: number for number, (_, _, members) in enumerate(live["stages"]) for worker in members}
    paces = sorted(each["step_s"] for each in live["workers"] if each["step_s"])
    usual = paces[len(paces) // 2] if paces else 0.0
    newest = max((each["step"] for each in live["workers"] if each["step"] is not None and not each["spare"]), default=0)
    rows = [(each, not ended and _trouble(each, usual, newest)) for each in live["workers"]]
    if len(rows) > room:
        rows = sorted(rows, key=lambda row: (not row[1], row[0]["worker"]))[:room]
    more = len(live["workers"]) - len(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for name in ("worker", "pid", "host", "stage", "doing", "step", "for", "step time", "memory"):
        table.add_column(name, no_wrap=True, header_style="dim")
    for each, trouble in rows:
        stage = "spare" if each["spare"] else str(stages.get(each["worker"], ""))
        pid, step = ("" if each[name] is None else str(each[name]) for name in ("pid", "step"))
        words = [str(each["worker"]), pid, each["host"], stage, "has ended" if ended else _doing(each), step]
        words += ["" if ended else seconds(each["for_s"]), seconds(each["step_s"]), "" if each["memory"] is None else size(each["memory"])]
        table.add_row(*words, style="yellow" if trouble else "")
    if more > 0:
        table.add_row("...", "", f"and {more} more")
    return table


def _trouble(each: Mapping[str, Any], usual: float, newest: int) -> bool:
    slow = bool(each["step_s"] and usual and each["step_s"] > _SLOW * usual)
    behind = each["step"] is not None and not each["spare"] and each["step"] < newest - 1
    return each["state"] in ("T", "t", "Z", "D") or slow or behind


def _doing(each: Mapping[str, Any]) -> str:
    if each["state"] in ("T", "t"):
        return "is stopped"
    phase = each["phase"] or "starts"
    where = f" {each['micro_batch']}" if each["micro_batch"] is not None else ""
    waits = "" if each["waits_for"] is None else f", waits for {each['waits_for']}"
    place = f", in the {each['place']}" if each["place"] in ("data loader", "checkpoint") else ""
    return f"{phase}{where}{waits}{place}" if each["place"] != "train_fn" else f"loop body{waits}"


def _links(live: Mapping[str, Any], most: int) -> list[str]:
    """The slowest links of which anything is known."""
    known = [link for link in live["links"] if link[3] is not None]
    slowest = sorted(known, key=lambda link: link[3])[:most]
    latency = lambda value: "" if value is None else f", {value * 1000:.2g} ms"  # noqa: E731
    words = [f"{a}-{b} {size(rate)}/s{latency(late)}" for a, b, late, rate in slowest]
    return [f"slowest links: {'; '.join(words)}"] if words else []


def operations(count: float) -> str:
    """Formats a number of floating-point operations."""
    for unit, factor in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("kFLOP", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} FLOP"


def size(count: float) -> str:
    """Formats a number of bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def seconds(value: float | None) -> str:
    """Formats seconds, an empty text for None."""
    if value is None:
        return ""
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.0f} ms"
