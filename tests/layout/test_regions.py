"""Tests the placement of parameters in layer vectors, cut points, and the validation of model descriptions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from layout_strategies import few, models

from elastic.errors import LayoutError
from elastic.layout.regions import ALIGNMENT, BLOCK, LayerSpec, ModelSpec, ParameterSpec, Tie


def test_parameters_lie_in_definition_order_each_at_a_multiple_of_64():
    layer = LayerSpec.build(0, [("weight", (10, 13), "float32"), ("scale", (), "float32"), ("bias", (64,), "bfloat16")])
    assert [(p.name, p.start, p.size, p.stop) for p in layer.parameters] == [
        ("weight", 0, 130, 130),
        ("scale", 192, 1, 193),
        ("bias", 256, 64, 320),
    ]
    assert layer.size == 320
    assert [p.itemsize for p in layer.parameters] == [4, 4, 2]


def test_a_layer_without_parameters_has_no_elements_and_no_cuts():
    model = ModelSpec(layers=(LayerSpec.build(0, []),))
    assert model.layers[0].size == 0
    assert list(model.cut_points(0)) == []


@few
@given(models())
def test_cuts_are_64_aligned_inside_every_parameter(model):
    for spec in model.layers:
        assert spec.size % ALIGNMENT == 0
        assert sum(p.size for p in spec.parameters) <= spec.size
        for point in model.cut_points(spec.index):
            assert 0 <= point < spec.size
            assert all((point - p.start) % ALIGNMENT == 0 for p in spec.parameters)
            if model.cut == "tensor":
                assert not any(p.start < point < p.stop for p in spec.parameters)
            else:
                assert point % BLOCK == 0
        if spec.size:
            assert 0 in model.cut_points(spec.index)


@few
@given(models())
def test_json_round_trip(model):
    assert ModelSpec.from_json(json.loads(json.dumps(model.to_json()))) == model


def test_equal_layers_share_one_description():
    def transformer(layers: int) -> ModelSpec:
        names = [("attention.weight", (96, 32)), ("attention.bias", (96,)), ("feed_forward.weight", (64, 32)), ("norm.weight", (32,))]
        return ModelSpec(
            layers=tuple(LayerSpec.build(i, [(f"blocks.{i}.{name}", shape, "float32") for name, shape in names]) for i in range(layers))
        )

    assert len(json.dumps(transformer(100).to_json())) < len(json.dumps(transformer(1).to_json())) + 100 * 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParameterSpec(name="w", shape=(1,), dtype="int4", start=0), "dtype 'int4'"),
        (lambda: ParameterSpec(name="w", shape=(1,), dtype="float32", start=65), "not a multiple of 64"),
        (lambda: ParameterSpec(name="w", shape=(-1,), dtype="float32", start=0), "negative extent"),
        (lambda: LayerSpec.build(0, [("w", (1,), "float32"), ("w", (1,), "float32")]), "same name"),
        (lambda: LayerSpec.build(1, [], [Tie(name="w", home=1)]), "not a lower one"),
        (lambda: LayerSpec(index=0, parameters=(ParameterSpec(name="w", shape=(1,), dtype="float32", start=64),)), "instead of 0"),
        (lambda: ModelSpec(layers=(LayerSpec.build(1, []),)), "has index 1"),
        (lambda: ModelSpec(layers=(LayerSpec.build(0, []), LayerSpec.build(1, [], [Tie(name="w", home=0)]))), "no parameter 'w'"),
        (lambda: ModelSpec(layers=(LayerSpec.build(0, [], (), 0),)), "part of layer 0, and there are 0 modules"),
        (lambda: ModelSpec(layers=(LayerSpec.build(0, []), LayerSpec.build(1, [], (), 1))), "part of layer 1, and there are 1 modules"),
        (lambda: ModelSpec(layers=(LayerSpec.build(0, []), LayerSpec.build(1, [], (), 0), LayerSpec.build(2, []))), "part of layer 0"),
        (
            lambda: ModelSpec(
                layers=(LayerSpec.build(0, [], [Tie(name="w", home=1)]), LayerSpec.build(1, [("w", (1,), "uint8")], (), 0, True))
            ),
            "not a lower one",
        ),
        (lambda: ModelSpec.from_json({"cut": "row", "forms": [], "layers": []}), "'block' or 'tensor'"),
    ],
)
def test_wrong_descriptions_are_refused(make, message):
    with pytest.raises(LayoutError, match=message):
        make()
