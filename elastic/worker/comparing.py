"""What a worker does when its memory has changed, or digests of copies that must be equal differ: which copies it gives up and reports.

All members find the same, since they judge by the same digests. A worker whose copy is wrong by the others' word gives that copy up. If
nothing shows which copy is wrong, all give up everything of that step and later ones, and go back to what they kept of an older one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic.engine.buffers import Damaged
from elastic.engine.shard import Updater
from elastic.errors import Interrupted, MemoryDamaged
from elastic.layout.transfer import PARAM
from elastic.observe.finding import Finding, parameters_in
from elastic.snapshot.comparison import Comparison, Copied, Difference, Digests, judged
from elastic.snapshot.rest_digests import WHOSE, Changed, Rest
from elastic.view import View

Gather = Callable[[dict[str, Any]], list[dict[str, Any]]]
"""Returns every member's value to every member."""

Blocks = Mapping[tuple[int, int, str], Sequence[str]]
"""Checksums of the blocks of copies, by the number of the difference, the worker, and the role."""

_BLOCK = 4096  # elements
_ADVICE = (
    "the loop body changes parameters in place without torch noticing (through `.data` or NumPy), which belongs into after_step (of the "
    "Trainer, or of the loader); or "
)


class Comparing:
    """One worker's part in comparisons in one view, whose first state is that of step `first`.

    `back`: copies of later steps than this one differ between workers, so they are not used; None: none do.
    """

    def __init__(self, worker: int, view: View, rest: Rest, first: int) -> None:
        self._worker, self._rest, self._first = worker, rest, first
        self._hosts = {member.worker: member.host for member in view.members}
        self._layers = view.layout.model.layers
        self._comparison = Comparison(worker, view.layout, rest)
        self.back: int | None = None

    def digests(self, step: int, before: int) -> Digests:
        """Returns what goes with READY: of parameters as of `step`, and of shards and replicas as of the step `before`."""
        return self._comparison.digests(step, before)

    def resolve(self, step: int, before: int, gather: Gather) -> MemoryDamaged | Interrupted:
        """Finds what differs, and gives up the copies that are wrong; all members call it. Returns the error to raise."""
        told = gather({"copies": [copy.to_json() for copy in self._comparison.copies(step, before)]})
        found = judged(Copied.from_json(copy) for each in told for copy in each["copies"])
        own = [(number, each.state, copy) for number, each in enumerate(found) for copy in each.copies if self._is_mine(copy)]
        mine = [[n, copy.role, self._rest.blocks(copy.role, copy.layer, copy.start, state, _BLOCK)] for n, state, copy in own]
        located = gather({"worker": self._worker, "blocks": mine})
        blocks = {(number, each["worker"], role): sums for each in located for number, role, sums in each["blocks"]}
        for difference in found:
            for copy in filter(self._is_mine, difference.wrong):
                self._rest.give_up(_changed(copy, difference))
        wrong = [self._named(number, each, copy, blocks) for number, each in enumerate(found) for copy in each.wrong if self._is_mine(copy)]
        unknown = [(number, each) for number, each in enumerate(found) if not each.wrong]
        if unknown:
            self.back = min(self._equal_before(each) for _, each in unknown)
        reporter = min((copy.worker for _, each in unknown for copy in each.copies), default=None)
        undecided = [self._undecided(*each, blocks) for each in unknown] if self._worker == reporter else []
        if not wrong and not undecided:
            return Interrupted("copies of the state differ between other workers")
        texts = [self._discards(wrong, "a copy is not what most other workers have")] if wrong else []
        if undecided:
            texts.append(
                f"copies of the state differ that must be equal: {undecided[0]}{_more(undecided)}. Nothing shows which is wrong, so all "
                f"workers go back to the newest state, of step {self.back} or before, that was the same in all copies. The steps after it "
                "are taken again; what loops were given of them may be wrong. The memory of one of these hosts may be faulty"
            )
        return MemoryDamaged("; ".join(texts), [each.to_json() for each in [*wrong, *undecided]])

    def _equal_before(self, difference: Difference) -> int:
        """Returns the newest step as of which the copies were equal. Gathered parameters come from each update anew; a replica that differs
        may have done so since its layer was compared last."""
        if any(copy.role == "replica" for copy in difference.copies):
            return max(self._first, self._rest.turn_before(difference.step, difference.layer))
        return difference.step - 1

    def _is_mine(self, copy: Copied) -> bool:
        return copy.worker == self._worker

    def check_scalars(self, owned: Updater, step: int) -> None:
        """Gives up the shards of which a scalar, such as a step count, has changed since their update; of layers whose turn it is."""
        for shard in owned.shards.values() if step >= 0 else ():
            if not self._rest.takes(step, shard.layer):
                continue
            for parameter, name, before, now in owned.changed_scalars(shard):
                where = {"layer": shard.layer, "start": shard.interval.start, "stop": shard.interval.stop, "step": step}
                self._rest.give_up(Changed(role="live", state=f"{name} of {parameter}", digests=(str(before), str(now)), **where))

    def damage(self, repaired: Sequence[Damaged] = ()) -> MemoryDamaged:
        """Returns the error that reports what has changed in this worker's memory. `repaired` are buffers."""
        changed = [each for each in self._rest.damaged.values() if each.key not in self._rest.told]
        changed = changed or ([] if repaired else [*self._rest.damaged.values()])
        found = [self._of(each) for each in changed] + [self._of_buffer(each) for each in repaired]
        return MemoryDamaged(self._discards(found, "memory at rest has changed"), [each.to_json() for each in found])

    def _discards(self, found: Sequence[Finding], what: str) -> str:
        by_loop = any(each.state == PARAM and each.copy in (WHOSE["live"], WHOSE["gathered"]) for each in found)
        why = f"{_ADVICE if by_loop else ''}the memory of this host may be faulty"
        who = f"worker {self._worker} (host {self._hosts[self._worker]})"
        return f"{who}: {what}: {found[0]}{_more(found)}. It discards that copy, and fetches an intact one; {why}"

    def _of(self, changed: Changed) -> Finding:
        was, now = changed.digests
        run = changed.state, changed.layer, changed.start, changed.stop, changed.step
        return self._finding(*run, changed.copy, {"when it was complete": was, "now": now}, self._worker, changed.step)

    def _of_buffer(self, buffer: Damaged) -> Finding:
        digests = {"when it was complete": buffer.was, "now": buffer.now}
        what = f"buffer {buffer.name}"
        return self._finding(what, buffer.layer, 0, buffer.elements, buffer.step, WHOSE["live"], digests, self._worker, buffer.step)

    def _named(self, number: int, difference: Difference, copy: Copied, blocks: Blocks) -> Finding:
        """Returns the finding that a copy is wrong."""
        right = next(each for each in difference.copies if each not in difference.wrong)
        digests = {who(each): each.digests[difference.state] for each in (copy, right)}
        start, stop = _narrowed(difference, blocks.get((number, copy.worker, copy.role)), blocks.get((number, right.worker, right.role)))
        return self._finding(difference.state, difference.layer, start, stop, difference.step, WHOSE[copy.role], digests, copy.worker)

    def _undecided(self, number: int, difference: Difference, blocks: Blocks) -> Finding:
        first = difference.copies[0]
        other = next(each for each in difference.copies if each.digests[difference.state] != first.digests[difference.state])
        digests = {f"{who(each)} (host {self._hosts[each.worker]})": each.digests[difference.state] for each in difference.copies}
        start, stop = _narrowed(difference, blocks.get((number, first.worker, first.role)), blocks.get((number, other.worker, other.role)))
        return self._finding(difference.state, difference.layer, start, stop, difference.step, "the", digests)

    def _finding(
        self,
        state: str,
        layer: int,
        start: int,
        stop: int,
        step: int,
        copy: str,
        digests: Mapping[str, str],
        worker: int | None = None,
        good: int | None = None,
    ) -> Finding:
        return Finding(
            state=state,
            layer=self._layers[layer].module,
            start=start,
            stop=stop,
            step=step,
            good=max(self._first, self._rest.turn_before(step, layer)) if good is None else good,
            copy=copy,
            worker=worker,
            host=None if worker is None else self._hosts[worker],
            parameters=() if state.startswith("buffer ") else parameters_in(self._layers[layer].parameters, start, stop),
            digests=digests,
        )


def who(copy: Copied) -> str:
    """Says in words which copy it is."""
    return f"{'owner' if copy.worker == copy.owner else 'replica' if copy.role == 'replica' else 'gathered'} worker {copy.worker}"


def _changed(copy: Copied, difference: Difference) -> Changed:
    return Changed(role=copy.role, layer=copy.layer, start=copy.start, stop=copy.stop, state=difference.state, step=copy.step)


def _more(found: Sequence[Finding]) -> str:
    return f" and of {len(found) - 1} more" if len(found) > 1 else ""


def _narrowed(difference: Difference, one: Sequence[str] | None, other: Sequence[str] | None) -> tuple[int, int]:
    """Returns the run in which two copies differ, by the checksums of their blocks."""
    places = [place for place, (mine, theirs) in enumerate(zip(one or (), other or (), strict=False)) if mine != theirs]
    if not places:
        return difference.start, difference.stop
    start = difference.start
    return start + places[0] * _BLOCK, min(difference.stop, start + (places[-1] + 1) * _BLOCK)
