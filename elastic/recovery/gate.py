"""Checks that a migration must pass before its view is committed. A refusal begins with the name of its check.

Checks of a proposal, before anything moves (run by the agent and by workers):

attempt       the epoch is the last one plus 1, and the attempt is at least 1
membership    every named worker is a member, every member has a stage, survivors keep identity and order, and at least one survives
routes        each stage computes every grain of the same batch once
stages        plan and layout have the same layers and members, of the same model
order, members, coverage, single owner, ownership, alignment, replication
              the layout's invariants, and as many copies of each interval as the job wants, if there are so many members; if state
              outlives its process, so many hosts. They are on different hosts, and in different racks while there are enough
transfers     each lies in its layer, is sent once, by a survivor, to another worker, or copied once, also from the segment of a worker
              that has died; no joiner lacks state afterwards
resume        the step exists, progress is of this step, scalars are of known parameters
restore       the checkpoint is of the resumed step, and the proposal carries no state besides it
salvage       the finished grains exist; a worker with its own inventory has usable sums of those routed to it
inventory     (a worker, with its own inventory) at most its newest yielded step is taken again, unless copies of the state differ; it
              has all that it sends, and will have all that it needs

Checks of the received state: completeness, contents, scalars.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NoReturn

from elastic.errors import GateRefused, LayoutError
from elastic.layout import invariants
from elastic.layout.runs import Run, missing
from elastic.layout.transfer import PARAM, Holding, Transfer, needs
from elastic.recovery.inventory import Inventory
from elastic.recovery.proposal import Proposal, holdings_at
from elastic.recovery.salvage import usable
from elastic.view import View, apart

StatePlace = tuple[int, str, int]
"""A worker, a state, and a layer."""


def check_proposal(proposal: Proposal, last: View | None, inventory: Inventory | None = None) -> None:
    """Raises GateRefused, with the name of the check, unless all checks hold.

    `last` is the previous view, None for a joiner; `inventory` is the one that the checking worker sent.
    """
    if last is not None:
        _check_attempt(proposal.view, last)
        _check_survivors(proposal, last)
    elif proposal.view.attempt < 1:
        _refuse("attempt", f"attempt {proposal.view.attempt} is below 1")
    _check_members(proposal)
    _check_routes(proposal.view, last)
    if proposal.routes:
        _check_complete(proposal.view, proposal.routes)
    _check_stages(proposal.view, last)
    _check_layout(proposal.view)
    _check_transfers(proposal, last)
    _check_resume(proposal)
    _check_salvage(proposal, inventory)
    if inventory is not None:
        _check_inventory(proposal, inventory)


def check_received(expected: Sequence[Transfer], received: Mapping[Transfer, Any], announced: Mapping[Transfer, Any]) -> None:
    """Raises GateRefused unless exactly the `expected` transfers of one worker arrived, with the digests that their senders announced."""
    if twice := [str(move) for move, count in Counter(expected).items() if count > 1]:
        _refuse("completeness", f"expected twice: {', '.join(twice)}")
    if lacking := [str(move) for move in expected if move not in received]:
        _refuse("completeness", f"not received: {', '.join(lacking)}")
    if extra := [str(move) for move in {**received, **announced} if move not in set(expected)]:
        _refuse("completeness", f"received, but not expected: {', '.join(extra)}")
    for move in expected:
        if move not in announced:
            _refuse("contents", f"{move}: the sender has announced no digest")
        if received[move] != announced[move]:
            _refuse("contents", f"{move}: received with digest {received[move]}, sent with digest {announced[move]}")


def check_scalars(expected: Mapping[str, Mapping[str, Any]], installed: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises GateRefused unless the `installed` scalars of one worker's parameters equal those `expected` by the proposal."""
    for name, values in installed.items():
        wanted = expected.get(name, {})
        for state in {**wanted, **values}:
            if state not in wanted or state not in values or wanted[state] != values[state]:
                _refuse("scalars", f"{state!r} of parameter {name!r} is {values.get(state)} here and {wanted.get(state)} in the proposal")


def _refuse(check: str, why: str) -> NoReturn:
    raise GateRefused(why, check=check)


def _check_attempt(view: View, last: View) -> None:
    if view.epoch != last.epoch + 1:
        _refuse("attempt", f"epoch {view.epoch} does not follow epoch {last.epoch}")
    if view.attempt < 1:
        _refuse("attempt", f"attempt {view.attempt} is below 1")


def _check_survivors(proposal: Proposal, last: View) -> None:
    view = proposal.view
    known = {member.worker: member for member in last.members}
    survivors = [member for member in view.members if member.worker in known]
    there = set(view.workers)
    if not survivors and proposal.restore is None and not proposal.copied:
        _refuse("membership", f"no member of epoch {last.epoch} is a member of epoch {view.epoch}")
    for member in survivors:
        if member != known[member.worker] and replace(member, slowdown=known[member.worker].slowdown) != known[member.worker]:
            _refuse("membership", f"worker {member.worker} was {known[member.worker]}, and the proposal has {member}")
    expected = (*(worker for worker in last.workers if worker in there), *sorted(there.difference(known)))
    if view.workers != expected:
        _refuse("membership", f"members are in the order {view.workers} instead of {expected}")


def _check_members(proposal: Proposal) -> None:
    view = proposal.view
    members, copied = set(view.workers), set(proposal.copied)
    leaving = {member.worker for member in proposal.leaving}
    if both := members & leaving:
        _refuse("membership", f"workers {sorted(both)} are members, and leave")
    replicas = {worker for layer in view.layout.layers for interval in layer.intervals for worker in interval.replicas}
    named = {
        "plan": set(view.plan.workers),
        "layout": {*view.layout.workers, *(i.owner for layer in view.layout.layers for i in layer.intervals), *replicas},
        "transfers": {
            *(move.destination for move in proposal.transfers),
            *(move.source for place, move in enumerate(proposal.transfers) if place not in copied),
        },
        "routes": {worker for route in view.plan.routes for worker in route},
    }
    for where, workers in named.items():
        if strangers := workers - members - (leaving if where == "transfers" else set()):
            _refuse("membership", f"{where} name{'s' * (where in ('plan', 'layout'))} workers {sorted(strangers)}, which are not members")
    if idle := members - set(view.plan.workers):
        _refuse("membership", f"members {sorted(idle)} have no stage")


def _check_routes(view: View, last: View | None) -> None:
    if last is not None and view.workload != last.workload:
        _refuse("routes", "the workload, and so the batch, differs from the previous view's")
    _check_complete(view, view.plan.routes)


def _check_complete(view: View, routes: Sequence[Sequence[int]]) -> None:
    """Refuses routes unless each stage computes each grain once, on a member."""
    if len(routes) != len(view.plan.stages):
        _refuse("routes", f"there are routes for {len(routes)} stages of {len(view.plan.stages)}")
    for number, (stage, route) in enumerate(zip(view.plan.stages, routes, strict=True)):
        if len(route) != view.workload.grains:
            _refuse("routes", f"stage {number} computes {len(route)} grains of {view.workload.grains}")
        if strangers := set(route).difference(stage.members):
            _refuse("routes", f"stage {number} sends grains to workers {sorted(strangers)}, which are not its members")
        computed = sorted(m for grain in range(len(route)) for m in view.workload.micro_batches_of(grain))
        if computed != list(range(view.workload.micro_batches)):
            _refuse("routes", f"stage {number} computes micro-batches {computed} instead of 0 to {view.workload.micro_batches - 1}")


def _check_stages(view: View, last: View | None) -> None:
    if last is not None and view.layout.model != last.layout.model:
        _refuse("stages", "the layout's model differs from the previous view's")
    planned, model = {layer: stage.members for stage in view.plan.stages for layer in stage.layers}, view.layout.model
    if len(planned) != len(view.workload.layers) or len(planned) != model.depth:
        counts = f"the workload {len(view.workload.layers)} and the model {model.depth}"
        _refuse("stages", f"the plan has {len(planned)} layers, {counts}")
    for layer in view.layout.layers:
        spec = model.layers[layer.layer] if layer.layer < len(model.layers) else None
        members = None if spec is None else planned.get(spec.module)
        if members != layer.members:
            title = f"layer {layer.layer}" if spec is None else spec.title
            _refuse("stages", f"{title} has members {layer.members} in the layout and {members} in the plan")


def _check_layout(view: View) -> None:
    places, hosts = apart(view.members, view.site), {member.worker: member.host for member in view.members}
    several, racks = len(set(hosts.values())) > 1, len(set(places.values()))
    wanted = view.fleet.replicas + 1
    try:
        invariants.check(view.layout, replicated=wanted > 1)
    except LayoutError as error:
        name, _, why = str(error).partition(": ")
        raise GateRefused(why, check=name) from error
    for layer in view.layout.layers:
        for interval in layer.intervals:
            holders = (interval.owner, *interval.replicas)
            run = f"{view.layout.model.layers[layer.layer].title}, run [{interval.start}, {interval.stop})"
            if len(holders) < wanted:
                _refuse("replication", f"{run}: it has {len(holders)} cop{'y' if len(holders) == 1 else 'ies'}, not {wanted}")
            for names, least in ((places, min(len(holders), racks)), (hosts, len(holders))) if several else ():
                found = Counter(names[worker] for worker in holders)
                if len(found) < least:
                    some = "both" if len(holders) == 2 else "two"
                    _refuse("replication", f"{run}: {some} copies are in one place, {max(found, key=found.__getitem__)}")


def _check_transfers(proposal: Proposal, last: View | None) -> None:
    if proposal.restore is not None:
        if proposal.transfers:
            _refuse("transfers", f"{proposal.transfers[0]}: every member reads its part from the checkpoint, so nothing may be sent")
        return
    specs = proposal.view.layout.model.layers
    sizes = [layer.size for layer in specs]
    arriving: dict[StatePlace, list[Run]] = defaultdict(list)
    copied, members, before = set(proposal.copied), set(proposal.view.workers), set(() if last is None else last.workers)
    relayed = {place for place, _ in proposal.relayed}
    for place, move in enumerate(proposal.transfers):
        if move.state != PARAM and move.state not in proposal.states:
            _refuse("transfers", f"{move}: no such state")
        if not (0 <= move.layer < len(sizes) and 0 <= move.start < move.stop <= sizes[move.layer]):
            _refuse("transfers", f"{move}: outside the model")
        if move.source == move.destination:
            _refuse("transfers", f"{move}: source and destination are the same worker")
        dead = place in copied and move.source not in members
        if last is not None and move.source not in before and not dead and place not in relayed:
            _refuse("transfers", f"{move}: the source has just joined and has no state")
        arriving[move.destination, move.state, move.layer].append((move.start, move.stop))
    for (worker, state, layer), runs in arriving.items():
        runs.sort()
        for (_, stop), (start, _) in pairwise(runs):
            if start < stop:
                _refuse("transfers", f"worker {worker} would receive {state} of {specs[layer].title} from element {start} twice")
    if last is not None:
        _check_short(proposal, members - before, arriving, [], "transfers")


def _check_short(
    proposal: Proposal, workers: Collection[int], arriving: Mapping[StatePlace, list[Run]], held: list[Holding], check: str
) -> None:
    """Refuses if one of `workers` would lack a run after all transfers; `held` is what they hold before."""
    present: dict[StatePlace, list[Run]] = defaultdict(list, {place: list(runs) for place, runs in arriving.items()})
    for holding in held:
        present[holding.worker, holding.state, holding.layer].append((holding.start, holding.stop))
    for need in needs(proposal.view.layout, [PARAM, *proposal.states], workers):
        for start, stop in missing([(need.start, need.stop)], sorted(present[need.worker, need.state, need.layer])):
            title = proposal.view.layout.model.layers[need.layer].title
            _refuse(check, f"worker {need.worker} would lack {need.state} of {title}, run [{start}, {stop})")


def _check_resume(proposal: Proposal) -> None:
    if proposal.resume < -1:
        _refuse("resume", f"there is no step {proposal.resume}")
    if proposal.progress is not None and proposal.progress.step != proposal.resume:
        _refuse("resume", f"progress is of step {proposal.progress.step}, but the state is of step {proposal.resume}")
    if proposal.restore is not None:
        _check_restore(proposal)
    if proposal.resume < 0 and proposal.states:
        _refuse("resume", "the initial state has no optimizer state, but the proposal has some")
    known = {parameter.name for layer in proposal.view.layout.model.layers for parameter in layer.parameters}
    if strangers := set(proposal.scalars) - known:
        _refuse("resume", f"scalars belong to parameters that the model does not have: {sorted(strangers)}")


def _check_restore(proposal: Proposal) -> None:
    assert proposal.restore is not None
    if proposal.restore.step != proposal.resume:
        _refuse("restore", f"{proposal.restore.name} is of step {proposal.restore.step}, but the view resumes at step {proposal.resume}")
    if proposal.states or proposal.scalars or proposal.progress is not None or proposal.finished:
        _refuse("restore", "all state comes from the checkpoint, but the proposal carries states, scalars, progress or finished grains too")


def _check_salvage(proposal: Proposal, inventory: Inventory | None) -> None:
    view, finished = proposal.view, proposal.finished
    if strangers := [grain for grain in finished if not 0 <= grain < view.workload.grains]:
        _refuse("salvage", f"grains {strangers} are listed as finished, but there are only {view.workload.grains}")
    if inventory is None:
        return
    worker, step = inventory.worker, proposal.resume + 1
    routes = proposal.routes or view.plan.routes
    mine = {grain for grain in finished if worker in (route[grain] for route in routes)}
    own = inventory.finished_of(step) if usable(view, routes, inventory, step) else None
    lacking = sorted(mine.difference(() if own is None else own.grains))
    if lacking and worker not in (heir for _, heir in proposal.heirs):
        _refuse("salvage", f"grains {lacking} of step {step} are listed as finished, but worker {worker} has no usable sums of them")


def _check_inventory(proposal: Proposal, inventory: Inventory) -> None:
    worker, resume = inventory.worker, proposal.resume
    if proposal.restore is not None:
        return
    if proposal.back is not None and resume > proposal.back:
        _refuse("inventory", f"copies of steps after {proposal.back} differ, and the proposal resumes at step {resume}")
    if proposal.back is None and resume < inventory.floor:
        _refuse("inventory", f"worker {worker} has yielded step {inventory.yielded} and cannot go back to the state after step {resume}")
    held = holdings_at([inventory], resume, list(proposal.states))
    had: dict[StatePlace, list[Run]] = defaultdict(list)
    for holding in held:
        had[worker, holding.state, holding.layer].append((holding.start, holding.stop))
    arriving: dict[StatePlace, list[Run]] = defaultdict(list)
    relayed = {place for place, _ in proposal.relayed}
    for place, move in enumerate(proposal.transfers):
        own = move.source == worker and place not in relayed
        if own and missing([(move.start, move.stop)], sorted(had[worker, move.state, move.layer])):
            _refuse("inventory", f"{move}: worker {worker} does not hold all of it at step {resume}")
        if move.destination == worker:
            arriving[worker, move.state, move.layer].append((move.start, move.stop))
    _check_short(proposal, [worker], arriving, held, "inventory")
