"""Tests profiles: round trips, missing entries, and estimates only on request."""

from __future__ import annotations

import json
import math

import pytest
from cluster_files import profiles_json

from elastic.errors import PlanError
from elastic.plan.cluster import DeviceKind
from elastic.plan.profiles import LayerBytes, LayerSeconds, Measured, Profiles

LAYERS = (LayerSeconds(1.0, 2.0, 0.5), LayerSeconds(3.0, 4.0, 0.5))
BYTES = {1: (LayerBytes(8.0, 16.0, 4.0),) * 2}
A, B = DeviceKind(name="a", memory_bytes=1.0, flops=2e12), DeviceKind(name="b", memory_bytes=1.0, flops=1e12)


def profiles(**more: tuple[LayerSeconds, ...]) -> Profiles:
    return Profiles(seconds={Measured("a", 2, 1): LAYERS, **{Measured(k, 4, 1): v for k, v in more.items()}}, bytes=BYTES)


def test_profiles_survive_json():
    assert Profiles.from_json(json.loads(json.dumps(profiles_json(profiles())))) == profiles()


def test_a_missing_profile_is_an_error_that_names_what_there_is():
    with pytest.raises(PlanError, match=r"no profile of a for micro-batches of 2 and tp 4; known for a \(size/tp\): 2/1"):
        profiles().of("a", 2, 4)
    with pytest.raises(PlanError, match="no profile for device kind b: measure one, or ask for interpolation from FLOPS"):
        profiles().check_kinds({"a": A, "b": B})


def test_interpolation_is_by_flops_and_only_by_request():
    found = profiles().interpolated({"a": A, "b": B})
    assert found.of("b", 2, 1) == tuple(LayerSeconds(*(2 * value for value in layer)) for layer in LAYERS)
    assert found.of("a", 2, 1) == LAYERS
    with pytest.raises(PlanError, match="b has no profile and cannot be interpolated: FLOPS"):
        profiles().interpolated({"a": A, "b": DeviceKind(name="b", memory_bytes=1.0)})


def test_a_layer_is_never_slower_than_for_a_larger_micro_batch():
    found = profiles(a=(LayerSeconds(0.5, 8.0, 0.25), LayerSeconds(3.0, 4.0, 1.0))).without_noise()
    assert found.of("a", 2, 1) == (LayerSeconds(0.5, 2.0, 0.25), LayerSeconds(3.0, 4.0, 0.5))


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_impossible_times_name_the_layer(value):
    with pytest.raises(PlanError, match=r"profile of a for micro-batches of 4 and tp 1, layer 1: backward_s is"):
        profiles(a=(LAYERS[0], LayerSeconds(1.0, value, 1.0)))


def test_profiles_of_other_models_are_refused():
    with pytest.raises(PlanError, match="has 1 layers instead of 2"):
        profiles(b=LAYERS[:1])
    with pytest.raises(PlanError, match="bytes of at least one layer"):
        Profiles(seconds={}, bytes={})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: data.pop("bytes"), "profiles.bytes is missing"),
        (lambda data: data["seconds"][0].update(tp=0), r"seconds\[0\].tp must be a positive whole number, not 0"),
        (lambda data: data["seconds"][0].pop("kind"), r"seconds\[0\].kind is missing"),
        (lambda data: data["seconds"][0].update(layers=3), r"seconds\[0\].layers must be a list"),
        (lambda data: data["bytes"][0]["layers"].append([1, 2]), r"bytes\[0\].layers\[2\] must be three numbers"),
        (lambda data: data["seconds"][0]["layers"][0].__setitem__(1, "x"), r"seconds\[0\].layers\[0\]\[1\] must be a number, not 'x'"),
    ],
)
def test_a_malformed_file_names_the_field(change, named):
    data = json.loads(json.dumps(profiles_json(profiles())))
    change(data)
    with pytest.raises(PlanError, match=named):
        Profiles.from_json(data)
