"""Tests plans on Sailor's data under the reference rules: quality, reported cost, and messages about wrong data."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from sailor_data import DATA, SAILOR, needs_data

from benchmarks import sailor
from benchmarks.sailor_rules import ReferenceRules
from elastic.errors import PlanError
from elastic.plan.division.costs import costs
from elastic.plan.division.division import Division
from elastic.plan.division.search import SearchLimits, divide

SCORE = DATA.parent / "tools" / "score_plan.py"
MIXES = {
    "one device": ("OPT-350", {"A100-40": 1}, 16),
    "odd counts": ("OPT-350", {"A100-40": 5, "V100-16": 7}, 100),
    "mixed stages": ("OPT-350", {"A100-40": 7, "V100-16": 5}, 128),
    "three kinds": ("GPT-Neo-2.7", {"GH-96": 2, "A100-40": 3, "V100-16": 5}, 64),
    "others": ("OPT-350", {"RTX-2080": 6, "Titan-RTX": 3}, 64),
}


def planned(model: str, gpus: dict[str, int], batch: int) -> tuple[ReferenceRules, Division]:
    data = sailor.load(SAILOR, model)
    rules = ReferenceRules(data.cluster(gpus), data.profiles)
    return rules, divide(rules, batch, SearchLimits(mixed=True))


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
def test_plans_fit_and_cost_what_an_independent_reckoning_says(mix, tmp_path):
    model, gpus, batch = MIXES[mix]
    rules, plan = planned(model, gpus, batch)
    told = costs(rules, plan.stages, plan.micro_batch, plan.micro_batches)
    assert told.fits
    assert told.step_s == pytest.approx(plan.step_s, rel=1e-9)
    if not SCORE.is_file():
        pytest.skip("score_plan.py is not beside the data")
    (tmp_path / "plan.json").write_text(json.dumps(sailor.plan_to_json(plan, rules.pools, rules.per_host, batch)))
    asked = ["--data", str(SAILOR), "--model", model, "--gpus", ",".join(f"{kind}={count}" for kind, count in gpus.items())]
    scored = subprocess.run([sys.executable, str(SCORE), str(tmp_path / "plan.json"), *asked], capture_output=True, text=True, check=True)
    assert json.loads(scored.stdout)["step_s"] == pytest.approx(plan.step_s, rel=1e-9)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "gpus", "batch", "most_s"),
    [("OPT-350", {"A100-40": 32, "V100-16": 96}, 1024, 5.2), ("GPT-Neo-2.7", {"A100-40": 32, "V100-16": 96}, 2048, 31.5)],
)
def test_plans_are_better_than_those_of_the_data(model, gpus, batch, most_s):
    data = sailor.load(SAILOR, model)
    plan = divide(ReferenceRules(data.cluster(gpus), data.profiles), batch)
    assert plan.exact
    assert plan.step_s <= most_s


@needs_data
def test_what_does_not_fit_is_explained():
    with pytest.raises(
        PlanError, match=r"layers 0 to 20 fill all devices \(V100-16\) and layer 21 fits nowhere: every device is \d+ bytes short"
    ):
        planned("OPT-350", {"V100-16": 1}, 8)


@needs_data
def test_requests_that_the_data_cannot_serve_name_the_reason():
    data = sailor.load(SAILOR, "GPT-Neo-2.7")
    with pytest.raises(PlanError, match=r"profiles_tmp\.json has no model BERT"):
        sailor.load(SAILOR, "BERT")
    with pytest.raises(PlanError, match="B100 is not a device kind of this data"):
        data.cluster({"B100": 1})
    with pytest.raises(PlanError, match="V100-16=0"):
        data.cluster({"V100-16": 0})
    with pytest.raises(PlanError, match="no profile for device kind RTX-3090"):
        ReferenceRules(data.cluster({"RTX-3090": 2}), data.profiles)
    with pytest.raises(PlanError, match="not connected"):
        data.cluster({"A100-40": 2, "RTX-3090": 2})


@pytest.mark.parametrize(
    ("content", "named"), [("{", "cannot be read"), ("{}", "pipeline_list is missing"), ('{"pipeline_list": []}', "not a measured run")]
)
def test_a_malformed_run_is_named(content, named, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(PlanError, match=rf"run\.json.*{named}"):
        sailor.load_run(tmp_path / "run.json")


def test_missing_data_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"profiles_tmp\.json cannot be read"):
        sailor.load(tmp_path, "OPT-350")
