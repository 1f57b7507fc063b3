"""Tests which parts of a micro-batch in flight a worker keeps when its layers, or what it sums, have changed."""

from __future__ import annotations

import torch

from elastic.engine.boundary import LEAF, Crossing
from elastic.engine.in_flight import InFlight
from elastic.engine.stage import LayerRun, LossLeaf

MODEL = 8


def forward(layers: range, *, upto: int | None = None) -> InFlight:
    """Layers `layers` of a model of eight, forward as far as `upto`, with the loss if they are the last."""
    state = InFlight.through(layers)
    for layer in layers:
        if upto is None or layer < upto:
            run = LayerRun(leaves=[], structure=LEAF, outputs=[])
            state.went_forward(layer, run, Crossing(structure=LEAF, tensors=(torch.ones(3),), differentiable=(True,)))
    if layers.stop == MODEL and upto is None:
        state.loss = LayerRun(leaves=[], structure=LEAF, outputs=[])
        state.leaf = LossLeaf(micro_batch=0, value=1.0, weight=1.0, tokens=3)
    return state


def backward(state: InFlight, down_to: int) -> InFlight:
    state.gradients, state.loss = [torch.ones(3)], None
    for layer in reversed(range(down_to, state.layers.stop)):
        state.went_backward(layer, [torch.ones(3)], [])
    return state


def fitted(state: InFlight, layers: range, *, moved: tuple[int, ...] = (), summed: bool = True) -> InFlight:
    state.fit(layers, MODEL, lambda layer: layer not in moved, lambda layer: summed)
    return state


def test_all_is_kept_if_nothing_has_changed():
    state = fitted(forward(range(2, 5)), range(2, 5))
    assert sorted(state.runs) == [2, 3, 4]
    assert state.output is not None
    assert not state.reads_input
    last = fitted(forward(range(5, 8)), range(5, 8))
    assert last.loss is not None
    assert last.leaf is not None


def test_layers_that_moved_are_computed_again():
    state = fitted(forward(range(2, 5)), range(2, 5), moved=(3,))
    assert sorted(state.runs) == [2, 4]
    assert fitted(forward(range(2, 5)), range(2, 5), moved=(2,)).reads_input
    assert fitted(forward(range(2, 5)), range(2, 5), moved=(4,)).output is None


def test_a_stage_that_grew_or_shrank_keeps_what_it_has_of_its_layers():
    grown = fitted(forward(range(2, 5)), range(1, 6))
    assert sorted(grown.runs) == [2, 3, 4]
    assert grown.output is None
    assert grown.reads_input
    shrunk = fitted(forward(range(2, 5)), range(3, 4))
    assert sorted(shrunk.runs) == [3]
    no_longer_last = fitted(forward(range(5, 8)), range(4, 7))
    assert (no_longer_last.loss, no_longer_last.leaf, sorted(no_longer_last.runs)) == (None, None, [5, 6])
    assert no_longer_last.output is no_longer_last.outputs[6], "it is sent to the stage after"
    now_of_the_stage_before = fitted(forward(range(5, 8)), range(6))
    assert (sorted(now_of_the_stage_before.runs), now_of_the_stage_before.output) == ([5], now_of_the_stage_before.outputs[5])


def test_an_output_that_was_changed_in_place_is_computed_again_if_it_is_read_again():
    state = forward(range(2, 5))
    output = state.outputs[3].crossing.tensors[0]
    assert output is not None
    output.mul_(2)  # by layer 4
    assert sorted(fitted(state, range(2, 5)).runs) == [2, 3, 4]
    assert sorted(fitted(state, range(2, 5), moved=(4,)).runs) == [2]
    final = forward(range(2, 5))
    final.outputs[4].crossing.tensors[0].mul_(2)  # pyright: ignore[reportOptionalMemberAccess]
    assert sorted(fitted(final, range(2, 5)).runs) == [2, 3]
    assert final.output is None


def test_a_backward_goes_on_only_with_what_it_has_summed():
    state = fitted(backward(forward(range(2, 5)), 3), range(2, 5))
    assert state.begun
    assert (state.below, sorted(state.runs)) == (3, [2])
    again = fitted(backward(forward(range(2, 5)), 3), range(2, 5), summed=False)
    assert not again.begun
    assert (again.below, sorted(again.runs), again.output) == (5, [2], None)
    done = fitted(backward(forward(range(5, 8)), 5), range(5, 8))
    assert done.begun
    assert done.leaf is not None
    assert not done.reads_input


def test_a_backward_does_not_go_on_below_or_above_other_layers():
    assert not fitted(backward(forward(range(2, 5)), 3), range(2, 6)).begun
    assert not fitted(backward(forward(range(2, 5)), 2), range(3, 5)).begun
    grown = fitted(backward(forward(range(2, 5)), 2), range(1, 5))
    assert grown.begun
    assert (grown.below, grown.reads_input) == (2, True)
