from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from elastic.engine.boundary import LEAF, Crossing, contiguous, decode, encode, flatten, unflatten
from elastic.engine.structure import found_class, takes_keywords
from elastic.errors import TrainerError
from elastic.memory.tensors import bytes_of


class Output(OrderedDict):
    """As the outputs of transformers are: a dict whose parts are attributes too."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(parts)
        self.__dict__.update(parts)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


def over_the_wire(crossing: Crossing) -> Crossing:
    parts = [np.frombuffer(part, np.uint8) if isinstance(part, bytes) else bytes_of(part) for part in encode(crossing)]
    message = np.concatenate(parts)
    aligned = np.empty(message.size + 64, np.uint8)
    start = -aligned.ctypes.data % 64
    aligned[start : start + message.size] = message
    return decode(aligned[start : start + message.size])


VALUES = [
    torch.randn(3, 5),
    (torch.randn(2), [torch.arange(4), None], {"a": torch.tensor(True), "b": (torch.zeros(0, 3),)}),
    {"h": torch.randn(2, 3).bfloat16(), "scalar": torch.tensor(2.5, dtype=torch.float64)},
    None,
    Output(logits=torch.randn(2, 3), more={"a": (torch.ones(1), None)}),
    (Pair(first=torch.randn(2), second=None), [Pair(first=torch.zeros(3), second=torch.ones(1))]),
]


@pytest.mark.parametrize("value", VALUES)
def test_values_cross_bit_for_bit_with_their_structure(value) -> None:
    structure, tensors = flatten(value, "here")
    flags = tuple(tensor.is_floating_point() for tensor in tensors)
    back = over_the_wire(Crossing(structure=structure, tensors=tuple(tensors), differentiable=flags))
    assert back.differentiable == flags
    assert back.structure == structure
    assert len(back.tensors) == len(tensors)
    for one, other in zip(tensors, back.tensors, strict=True):
        assert other is not None
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)
        assert other.data_ptr() % 64 == 0 or other.numel() == 0
    rebuilt, again = flatten(unflatten(back.structure, [t for t in back.tensors if t is not None]), "there")
    assert rebuilt == structure
    assert len(again) == len(tensors)


def test_what_has_a_class_of_its_own_keeps_it() -> None:
    given = (Output(logits=torch.ones(2), loss=None), Pair(first=torch.zeros(1), second=None))
    structure, tensors = flatten(given, "here")
    back = over_the_wire(Crossing(structure=structure, tensors=tuple(tensors), differentiable=(True, True)))
    output, pair = unflatten(back.structure, [tensor for tensor in back.tensors if tensor is not None])
    assert (type(output), type(pair)) == (Output, Pair)
    assert torch.equal(output.logits, torch.ones(2))
    assert (output["loss"], output.loss, pair.second) == (None, None, None)


@pytest.mark.parametrize("path", ["os:system", "builtins:tuple", "builtins:object", "no_such_module:A", "collections:NoSuch"])
def test_no_other_class_comes_over_the_wire(path: str) -> None:
    with pytest.raises(TrainerError, match="came over a layer boundary"):
        found_class(path)


def _dict_and_more(batch, scale=1.0): ...
def _ids_and_mask(input_ids, attention_mask=None): ...
def _anything(*args, **kwargs): ...
def _ids_and_anything(input_ids, **kwargs): ...
def _only_position(x, /): ...


@pytest.mark.parametrize(
    ("call", "names", "expected"),
    [
        (_ids_and_mask, ["input_ids", "attention_mask"], True),
        (_ids_and_mask, ["input_ids"], True),
        (_ids_and_mask, ["input_ids", "labels"], False),
        (_ids_and_mask, ["attention_mask"], False),
        (_ids_and_anything, ["input_ids", "labels"], True),
        (_dict_and_more, ["input_ids", "scale"], False),
        (_anything, ["input_ids"], False),
        (_only_position, ["x"], False),
        (_ids_and_mask, [], False),
        (torch.relu, ["input"], False),
    ],
)
def test_a_dict_goes_by_keyword_to_who_takes_its_names(call, names, expected) -> None:
    assert takes_keywords(call, dict.fromkeys(names)) is expected


def test_gradients_may_be_missing() -> None:
    back = over_the_wire(Crossing(structure=None, tensors=(None, torch.ones(3), None), differentiable=()))
    assert [tensor is None for tensor in back.tensors] == [True, False, True]


@pytest.mark.parametrize("value", [3, "text", {1: torch.ones(1)}, {"a": object()}, [torch.ones(1), 2.0], (x for x in [1])])
def test_what_cannot_cross_is_refused_by_name(value) -> None:
    with pytest.raises(TrainerError, match=r"layer 7 \(Odd\) gave a \w+, which cannot cross a layer boundary: give a tensor"):
        flatten(value, "layer 7 (Odd)")


def test_contiguous_memory_is_aligned_and_not_copied_without_need() -> None:
    base = torch.randn(8, 8)
    assert contiguous(base) is base
    for view in (base.t(), base.view(-1)[1:33], base[:, 1:]):
        made = contiguous(view)
        assert made.is_contiguous()
        assert made.data_ptr() % 64 == 0
        assert torch.equal(made, view)


def test_a_leaf_marks_a_tensor() -> None:
    assert flatten(torch.ones(1), "here")[0] is LEAF
