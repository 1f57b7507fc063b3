"""What a migration must pass before its view may be committed. Every check has a name, which begins its refusal.

Of a proposal, before anything moves (agent and workers):

attempt           the epoch follows the last one, and the attempt is one
membership    everyone who is named is a member, every member has a place, survivors are who they were, and at least one survives
routes        each stage computes every grain of the same batch once
stages        plan and layout tell the same members and layers, of the same model
order, members, coverage, single owner, ownership, alignment, replication
              the layout's invariants, and two copies wherever there are two members
transfers     they lie in their layers, are sent once, from survivors and to others than the sender, and leave no joiner short
resume        the step exists, progress is of this step, scalars are of known parameters
restore       a checkpoint to begin with is of the resumed step, and what is in it does not come from elsewhere too
salvage       grains that need not be computed again exist; (a worker, with its own inventory) it has finished those that it would compute
inventory     (a worker, with its own) of the yielded steps only the newest is taken back; it has what it is to send, and will have
              what it needs

Of what was received: completeness, contents, scalars.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
from elastic.view import View

StatePlace = tuple[int, str, int]
"""A worker, a state, and a layer."""


def check_proposal(proposal: Proposal, last: View | None, inventory: Inventory | None = None) -> None:
    """Raises GateRefused, with the name of the check, unless all hold.

    `last` is the view before, None for a joiner, which has not seen it; `inventory` is what the checking worker has promised.
    """
    if last is not None:
        _check_attempt(proposal.view, last)
        _check_survivors(proposal, last)
    elif proposal.view.attempt < 1:
        _refuse("attempt", f"attempt {proposal.view.attempt} is not one")
    _check_members(proposal)
    _check_routes(proposal.view, last)
    _check_stages(proposal.view, last)
    _check_layout(proposal.view)
    _check_transfers(proposal, last)
    _check_resume(proposal)
    _check_salvage(proposal, inventory)
    if inventory is not None:
        _check_inventory(proposal, inventory)


def check_received(expected: Sequence[Transfer], received: Mapping[Transfer, Any], announced: Mapping[Transfer, Any]) -> None:
    """`expected` are one worker's; the others map transfers to digests, of what has arrived and of what its sender says it sent."""
    if twice := [str(move) for move, count in Counter(expected).items() if count > 1]:
        _refuse("completeness", f"expected twice: {', '.join(twice)}")
    if lacking := [str(move) for move in expected if move not in received]:
        _refuse("completeness", f"not received: {', '.join(lacking)}")
    if extra := [str(move) for move in {**received, **announced} if move not in set(expected)]:
        _refuse("completeness", f"received, and not expected: {', '.join(extra)}")
    for move in expected:
        if move not in announced:
            _refuse("contents", f"{move}: the sender has announced no digest")
        if received[move] != announced[move]:
            _refuse("contents", f"{move}: its digest is {received[move]}, and its sender's {announced[move]}")


def check_scalars(expected: Mapping[str, Mapping[str, Any]], installed: Mapping[str, Mapping[str, Any]]) -> None:
    """`expected` are a proposal's, of all parameters; `installed` are one worker's, of those that it owns or replicates."""
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
        _refuse("attempt", f"attempt {view.attempt} is not one")


def _check_survivors(proposal: Proposal, last: View) -> None:
    view = proposal.view
    known = {member.worker: member for member in last.members}
    survivors = [member for member in view.members if member.worker in known]
    if not survivors and proposal.restore is None:
        _refuse("membership", f"nobody of epoch {last.epoch} is a member of epoch {view.epoch}")
    for member in survivors:
        if replace(member, slowdown=known[member.worker].slowdown) != known[member.worker]:
            _refuse("membership", f"worker {member.worker} was {known[member.worker]} and is to be {member}")
    expected = (*(worker for worker in last.workers if worker in view.workers), *sorted(set(view.workers).difference(known)))
    if view.workers != expected:
        _refuse("membership", f"members are in the order {view.workers} instead of {expected}")


def _check_members(proposal: Proposal) -> None:
    view = proposal.view
    members = set(view.workers)
    replicas = {interval.replica for layer in view.layout.layers for interval in layer.intervals if interval.replica is not None}
    named = {
        "plan": set(view.plan.workers),
        "layout": {*view.layout.workers, *(i.owner for layer in view.layout.layers for i in layer.intervals), *replicas},
        "transfers": {worker for move in proposal.transfers for worker in (move.source, move.destination)},
        "routes": {worker for route in view.plan.routes for worker in route},
    }
    for where, workers in named.items():
        if strangers := workers - members:
            _refuse("membership", f"{where} name{'s' * (where in ('plan', 'layout'))} workers {sorted(strangers)}, which are not members")
    if idle := members - set(view.plan.workers):
        _refuse("membership", f"members {sorted(idle)} have no stage")


def _check_routes(view: View, last: View | None) -> None:
    if last is not None and view.workload != last.workload:
        _refuse("routes", "the workload is another than before, and with it the batch")
    for number, (stage, route) in enumerate(zip(view.plan.stages, view.plan.routes, strict=True)):
        if len(route) != view.workload.grains:
            _refuse("routes", f"stage {number} computes {len(route)} grains of {view.workload.grains}")
        if strangers := set(route).difference(stage.members):
            _refuse("routes", f"stage {number} sends grains to workers {sorted(strangers)}, which are not in it")
        computed = sorted(m for worker in stage.members for m in view.plan.micro_batches_of(worker, view.workload))
        if computed != list(range(view.workload.micro_batches)):
            _refuse("routes", f"stage {number} computes micro-batches {computed} instead of 0 to {view.workload.micro_batches - 1}")


def _check_stages(view: View, last: View | None) -> None:
    if last is not None and view.layout.model != last.layout.model:
        _refuse("stages", "the layout is of another model than before")
    planned = {layer: stage.members for stage in view.plan.stages for layer in stage.layers}
    if len(planned) != len(view.workload.layers) or len(planned) != len(view.layout.model.layers):
        _refuse("stages", f"the plan has {len(planned)} layers, the workload {len(view.workload.layers)}, the model another number or both")
    for layer in view.layout.layers:
        if planned.get(layer.layer) != layer.members:
            _refuse("stages", f"layer {layer.layer} has members {layer.members} in the layout and {planned.get(layer.layer)} in the plan")


def _check_layout(view: View) -> None:
    try:
        invariants.check(view.layout)
    except LayoutError as error:
        name, _, why = str(error).partition(": ")
        raise GateRefused(why, check=name) from error
    hosts = {member.worker: member.host for member in view.members}
    for layer in view.layout.layers:
        for interval in layer.intervals:
            alone = interval.replica is None or interval.replica == interval.owner
            if alone and len(view.members) > 1:
                _refuse("replication", f"layer {layer.layer}, run [{interval.start}, {interval.stop}): one copy only")
            if interval.replica is not None and len(set(hosts.values())) > 1 and hosts[interval.owner] == hosts[interval.replica]:
                _refuse("replication", f"layer {layer.layer}, run [{interval.start}, {interval.stop}): both copies on one host")


def _check_transfers(proposal: Proposal, last: View | None) -> None:
    if proposal.restore is not None:
        if proposal.transfers:
            _refuse("transfers", f"{proposal.transfers[0]}: every member has a checkpoint to read its part from")
        return
    layers = proposal.view.layout.model.layers
    arriving: dict[StatePlace, list[Run]] = defaultdict(list)
    for move in proposal.transfers:
        if move.state != PARAM and move.state not in proposal.states:
            _refuse("transfers", f"{move}: no such state")
        if not (0 <= move.layer < len(layers) and 0 <= move.start < move.stop <= layers[move.layer].size):
            _refuse("transfers", f"{move}: outside of the model")
        if move.source == move.destination:
            _refuse("transfers", f"{move}: to the sender itself")
        if last is not None and move.source not in last.workers:
            _refuse("transfers", f"{move}: from a worker that has just joined")
        arriving[move.destination, move.state, move.layer].append((move.start, move.stop))
    for (worker, state, layer), runs in arriving.items():
        runs.sort()
        for (_, stop), (start, _) in pairwise(runs):
            if start < stop:
                _refuse("transfers", f"worker {worker} gets {state} of layer {layer} from {start} twice")
    if last is not None:
        _check_short(proposal, [worker for worker in proposal.view.workers if worker not in last.workers], arriving, [], "transfers")


def _check_short(
    proposal: Proposal, workers: Iterable[int], arriving: Mapping[StatePlace, list[Run]], held: list[Holding], check: str
) -> None:
    """Nobody of `workers` lacks a run when all transfers are done; `held` are theirs before."""
    present: dict[StatePlace, list[Run]] = defaultdict(list, {place: list(runs) for place, runs in arriving.items()})
    for holding in held:
        present[holding.worker, holding.state, holding.layer].append((holding.start, holding.stop))
    for need in needs(proposal.view.layout, [PARAM, *proposal.states]):
        if need.worker not in workers:
            continue
        for start, stop in missing([(need.start, need.stop)], sorted(present[need.worker, need.state, need.layer])):
            _refuse(check, f"worker {need.worker} would lack {need.state} of layer {need.layer}, run [{start}, {stop})")


def _check_resume(proposal: Proposal) -> None:
    if proposal.resume < -1:
        _refuse("resume", f"there is no step {proposal.resume}")
    if proposal.progress is not None and proposal.progress.step != proposal.resume:
        _refuse("resume", f"progress is of step {proposal.progress.step}, and the state of step {proposal.resume}")
    if proposal.restore is not None:
        _check_restore(proposal)
    if proposal.resume < 0 and proposal.states:
        _refuse("resume", "the initial state has no optimizer state, and the proposal has")
    known = {parameter.name for layer in proposal.view.layout.model.layers for parameter in layer.parameters}
    if strangers := set(proposal.scalars) - known:
        _refuse("resume", f"scalars are of parameters that the model does not have: {sorted(strangers)}")


def _check_restore(proposal: Proposal) -> None:
    assert proposal.restore is not None
    if proposal.restore.step != proposal.resume:
        _refuse("restore", f"{proposal.restore.name} is of step {proposal.restore.step}, and the view is to go on from {proposal.resume}")
    if proposal.states or proposal.scalars or proposal.progress is not None or proposal.finished:
        _refuse("restore", "what comes from a checkpoint is not in the proposal, and this one has some of it")


def _check_salvage(proposal: Proposal, inventory: Inventory | None) -> None:
    view, finished = proposal.view, proposal.finished
    if strangers := [grain for grain in finished if not 0 <= grain < view.workload.grains]:
        _refuse("salvage", f"grains {strangers} are said to be finished, and there are only {view.workload.grains}")
    if inventory is None:
        return
    worker, step = inventory.worker, proposal.resume + 1
    mine = {grain for grain in finished if worker in (route[grain] for route in view.plan.routes)}
    if lacking := sorted(mine - usable(view, inventory, step)):
        _refuse("salvage", f"grains {lacking} of step {step} are said to be finished, and worker {worker} has not what it needs for that")


def _check_inventory(proposal: Proposal, inventory: Inventory) -> None:
    worker, resume = inventory.worker, proposal.resume
    if proposal.restore is not None:
        return
    if resume < inventory.floor:
        _refuse("inventory", f"step {inventory.yielded} was yielded on worker {worker}, and the proposal goes back behind step {resume}")
    held = holdings_at([inventory], resume, list(proposal.states))
    had: dict[StatePlace, list[Run]] = defaultdict(list)
    for holding in held:
        had[worker, holding.state, holding.layer].append((holding.start, holding.stop))
    arriving: dict[StatePlace, list[Run]] = defaultdict(list)
    for move in proposal.transfers:
        if move.source == worker and missing([(move.start, move.stop)], sorted(had[worker, move.state, move.layer])):
            _refuse("inventory", f"{move}: worker {worker} does not hold all of it at step {resume}")
        if move.destination == worker:
            arriving[worker, move.state, move.layer].append((move.start, move.stop))
    _check_short(proposal, [worker], arriving, held, "inventory")
