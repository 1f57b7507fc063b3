"""Views, and the inventories that their workers would send: what they hold of a step and of the previous one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from elastic.layout.layout import spread
from elastic.layout.regions import BLOCK, LayerSpec, ModelSpec
from elastic.plan.fleet import Fleet
from elastic.plan.planner import fastest
from elastic.plan.workload import LayerCost, Workload
from elastic.recovery.inventory import Copy, Inventory, Progress
from elastic.view import Member, View

STATES = {"exp_avg": "same", "exp_avg_sq": "float32"}


def member(worker: int, host: str = "host") -> Member:
    return Member(worker=worker, host=host, address=f"unix:@{worker}")


def view_of(workers: Sequence[int], layers: int = 4, blocks: int = 9, stages: int | None = None, hosts: Sequence[str] = ("host",)) -> View:
    model = ModelSpec(
        layers=tuple(
            LayerSpec.build(i, [(f"{i}.w", (blocks * BLOCK + 100,), "bfloat16"), (f"{i}.b", (7,), "bfloat16")]) for i in range(layers)
        )
    )
    costs = tuple(LayerCost(forward_s=0.1, backward_s=0.2, parameters=9, activation_bytes=1000) for _ in range(layers))
    workload = Workload(layers=costs, micro_batches=8, grains=4)
    chosen = fastest(Fleet(workers=tuple(workers)), workload, stages)
    members = tuple(member(worker, hosts[worker % len(hosts)]) for worker in workers)
    on = {one.worker: one.host for one in members}
    layout = spread(model, [(stage.layers, stage.members) for stage in chosen.stages], on)
    return View(epoch=3, attempt=1, members=members, plan=chosen, layout=layout, workload=workload)


def inventory_of(view: View, worker: int, step: int, ahead: Collection[int] = ()) -> Inventory:
    """Returns an inventory of all of `step`, with complete replicas; workers `ahead` have applied the next step too."""
    copies: list[Copy] = []
    for layer in view.layout.layers:
        if worker in layer.members and worker not in ahead:
            copies.append(Copy(layer=layer.layer, start=0, stop=view.layout.model.layers[layer.layer].size, step=step, role="gathered"))
        for i in layer.intervals:
            if i.owner == worker:
                role = "previous" if worker in ahead else "live"
                copies.append(Copy(layer=layer.layer, start=i.start, stop=i.stop, step=step, role=role))
                if worker in ahead:
                    copies.append(Copy(layer=layer.layer, start=i.start, stop=i.stop, step=step + 1, role="live"))
            if worker in i.replicas:
                copies.append(Copy(layer=layer.layer, start=i.start, stop=i.stop, step=step, role="replica"))
    owned = [view.layout.model.layers[layer].parameters[0].name for layer, _ in view.layout.owned(worker)]
    return Inventory(
        worker=worker,
        yielded=step - 1,
        copies=tuple(copies),
        states=dict(STATES) if step >= 0 else {},
        scalars={step: {name: {"step": float(step + 1)} for name in owned}} if step >= 0 else {},
        progress={step: Progress(step=step, apply={"clip": 1.0, "loss": 0.5}, groups=[{"lr": 0.1}])} if step >= 0 else {},
    )


def inventories_of(view: View, workers: Sequence[int], step: int = 5, ahead: Collection[int] = ()) -> dict[int, Inventory]:
    return {worker: inventory_of(view, worker, step, ahead) for worker in workers}
