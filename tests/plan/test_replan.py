"""Tests plans from files to devices, and what moves when devices are lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from cluster_files import profiles_json
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from elastic.cli.main import app
from elastic.errors import PlanError
from elastic.plan import files, gantt, picture
from elastic.plan.cluster import Cluster, DeviceKind, Host, Levels, LinkEnd
from elastic.plan.curves import Constant
from elastic.plan.deploy import Deployed, Device, deploy, devices, lost, without
from elastic.plan.division.division import Division, Section
from elastic.plan.division.physical import PhysicalRules
from elastic.plan.division.search import SearchLimits
from elastic.plan.division.shapes import Shape, alike
from elastic.plan.moves import holdings
from elastic.plan.profiles import Profiles
from elastic.plan.replan import after_loss, plan_for, prepare
from elastic.plan.transformer import Transformer

CLUSTERS = Path(__file__).parents[2] / "examples" / "clusters"
SMALL = Transformer(layers=6, hidden=512, heads=8, sequence=512, vocabulary=4000, utilisation=0.5, sizes=(1, 2), degrees=(1, 2))


def cluster(*counts: int, memory: float = 16e9) -> Cluster:
    """Hosts of two kinds in turns, in one zone each."""
    kinds = {
        "fast": DeviceKind(name="fast", memory_bytes=memory, flops=100e12),
        "slow": DeviceKind(name="slow", memory_bytes=memory, flops=40e12),
    }
    hosts = tuple(Host(name=f"h{i}", zone="z", kind=("fast", "slow")[i % 2], count=count) for i, count in enumerate(counts))
    links = Levels(within_host=Constant(bytes_per_s=50e9), within_zone=Constant(latency_s=1e-4, bytes_per_s=3e9))
    return Cluster(kinds={host.kind: kinds[host.kind] for host in hosts}, hosts=hosts, links=links)


def planned(*counts: int, batch: int = 32) -> Deployed:
    there = cluster(*counts)
    return plan_for(there, SMALL.profiles(there), batch)


def check(found: Deployed) -> None:
    """Every slot has a device of its own, of the right kind, and ranks share a host."""
    used = list(found.devices.values())
    assert len(set(used)) == len(used)
    assert set(used) <= set(devices(found.cluster)) | set(used)
    kinds = {host.name: host.kind for host in found.cluster.hosts}
    for slot, device in found.devices.items():
        shape = found.division.stages[slot.stage].makeup.each()[slot.replica]
        assert kinds[device.host] == found.rules.pools[shape.pool].kind
        assert device.host == found.devices[slot._replace(rank=0)].host
    assert sum(shape.tp for stage in found.division.stages for shape in stage.makeup.each()) == len(used)
    assert found.prediction.fits


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_a_loss_is_planned_for_and_what_moves_is_what_is_missing(counts, data):
    before = planned(*counts)
    check(before)
    gone = data.draw(st.sampled_from(devices(before.cluster)))
    if sum(counts) < 3:
        return
    then = after_loss(before, {gone}, 32)
    check(then.deployed)
    assert gone not in then.move.devices.values()
    needs = holdings(then.deployed, then.deployed.rules.profiles)
    assert set(then.move.devices) == set(needs)
    sent = sum(send.piece.stop - send.piece.start for send in then.move.transfers.sends)
    assert sent == then.move.moved_bytes
    assert then.move.transfers.finish_s >= then.move.transfers.bound_s * (1 - 1e-9)
    if then.stay_over_horizon_s is not None:
        assert then.over_horizon_s <= then.stay_over_horizon_s * 1.5 + then.move.transfers.finish_s


def test_nothing_moves_where_nothing_is_lost():
    before = planned(4, 4)
    then = after_loss(before, before.idle[:1] or [], 32)
    if not before.idle:
        assert then.move.moved_bytes == 0


def test_a_short_horizon_stays_and_a_long_one_goes():
    before = planned(4, 4, 4, 4, batch=64)
    gone = {before.stage(0)[0]}
    short, long = (after_loss(before, gone, 64, horizon=steps) for steps in (1, 10**6))
    assert short.over_horizon_s <= (short.stay_over_horizon_s or 0) + short.move.transfers.finish_s
    assert long.deployed.plan.step_s <= short.deployed.plan.step_s * (1 + 1e-9)


def test_what_is_prepared_is_what_would_be_found():
    before = planned(4, 3, 2)
    prepared = prepare(before, 32)
    assert prepared.classes == 5, "one of either kind, a host of each count"
    for device in devices(before.cluster):
        now, then = (after_loss(before, {device}, 32, prepared=known) for known in (None, prepared))
        assert (now.deployed.plan, now.move.moved_bytes) == (then.deployed.plan, then.move.moved_bytes)


def test_state_that_was_nowhere_else_is_told():
    there = cluster(1, 1, 1)
    profiles = SMALL.profiles(there)
    rules = PhysicalRules(there, profiles)
    fast, slow = (alike(Shape(pool, 1), 1) for pool in (0, 1))
    cuts = ((range(3), fast), (range(3, 6), slow), (range(6, 8), fast))
    stages = tuple(Section(layers=layers, makeup=makeup) for layers, makeup in cuts)
    plan = Division(micro_batch=1, micro_batches=32, stages=stages, step_s=1.0, exact=False)
    whole = Deployed.of(there, rules, plan, deploy(plan, there, rules.pools, devices(there)), "")
    with pytest.raises(PlanError, match=r"no worker has byte"):
        after_loss(whole, {Device("h0", 0), Device("h2", 0)}, 32)
    for host in ("h0", "h1", "h2"):
        check(after_loss(whole, {Device(host, 0)}, 32).deployed)


def test_hosts_and_devices_can_be_lost():
    there = cluster(2, 3)
    assert lost(there, "h1") == {Device("h1", 0), Device("h1", 1), Device("h1", 2)}
    assert lost(there, "h0/1") == {Device("h0", 1)}
    left = without(there, lost(there, "h1") | lost(there, "h0/1"))
    assert [(host.name, host.count) for host in left.hosts] == [("h0", 1)]
    for unknown in ("h7", "h0/2"):
        with pytest.raises(PlanError, match=f"no device {unknown}"):
            lost(there, unknown)


def test_ranks_that_share_no_host_are_refused():
    found = planned(4, 4)
    wide = next((shape for stage in found.division.stages for shape in stage.makeup.each() if shape.tp > 1), None)
    if wide is not None:
        spread = [Device(f"{host.name}{i}", 0) for host in found.cluster.hosts for i in range(host.count)]
        with pytest.raises(PlanError, match="devices left for replica"):
            deploy(found.division, found.cluster, found.rules.pools, spread)


def test_a_transformer_counts_its_operations():
    model = Transformer(layers=2, hidden=1024, heads=16, sequence=2048, vocabulary=50304, utilisation=0.5)
    block, head = model.forward_flops(1)
    assert block == 24 * 2048 * 1024**2 + 4 * 2048**2 * 1024
    assert head == 2 * 2048 * 1024 * 50304
    there = cluster(2, 1)
    profiles = model.profiles(there)
    fast, slow = (profiles.of(kind, 1, 1)[1] for kind in ("fast", "slow"))
    assert fast.forward_s == pytest.approx(block / (0.5 * 100e12))
    assert slow.forward_s == pytest.approx(2.5 * fast.forward_s)
    assert fast.backward_s == pytest.approx(2 * fast.forward_s)
    assert profiles.bytes[1][1].parameters == 4 * (12 * 1024**2 + 13 * 1024)


def test_tensor_parallelism_pays_for_its_messages():
    there = cluster(2, 2)
    alone, split = (SMALL.profiles(there).of("fast", 2, tp)[1] for tp in (1, 2))
    curve = there.links.curve(LinkEnd("z", "fast", 1, "h0"), LinkEnd("z", "fast", 1, "h0"))
    message = 2 * 2 * 512 * 512
    assert split.forward_s == pytest.approx(alone.forward_s / 2 + 2 * 2 * float(curve.seconds(message / 2)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 0}, "transformer.layers is 0"),
        ({"utilisation": 1.5}, "utilisation is 1.5"),
        ({"degrees": (3,)}, "cannot be split 3 ways"),
        ({"sizes": ()}, "must not be empty or below 1"),
    ],
)
def test_a_transformer_that_cannot_be(changes: dict[str, Any], said: str):
    with pytest.raises(PlanError, match=said):
        replace(SMALL, **changes)


def test_a_kind_without_flops_is_told():
    there = cluster(1, 1)
    kinds = {name: replace(kind, flops=None) for name, kind in there.kinds.items()}
    with pytest.raises(PlanError, match=r"kinds\.fast needs flops"):
        SMALL.profiles(replace(there, kinds=kinds))


def test_the_picture_is_of_the_plan():
    found = planned(4, 4, batch=64)
    line, shown = picture.timeline(found.division, found.rules)
    assert shown == found.division.replicas
    assert len(line.spans) == len(found.division.stages) * shown
    assert line.end_s == pytest.approx(found.prediction.step_s, rel=0.25)
    ElementTree.fromstring(gantt.svg(line))


# Files and the command


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "160"})


FILES = ("--cluster", str(CLUSTERS / "mixed.toml"), "--workload", str(CLUSTERS / "gpt-1.3b.toml"))


def test_the_command_prints_draws_and_loses(tmp_path: Path):
    drawn = tmp_path / "step.svg"
    result = run(*FILES, "--json", "--svg", str(drawn), "--lose", "date")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    stages = found["stages"]
    assert [stage["layers"][0] for stage in stages[1:]] == [stage["layers"][1] for stage in stages[:-1]]
    assert stages[-1]["layers"][1] == 26
    assert all(stage["memory_bytes"] <= stage["memory_limit_bytes"] for stage in stages)
    used = [device for stage in stages for device in stage["devices"]]
    assert sorted(used + found["idle_devices"]) == sorted(str(device) for device in devices(files.cluster(CLUSTERS / "mixed.toml")))
    after = found["after"]
    assert after["lost"] == ["date/0", "date/1", "date/2", "date/3"]
    assert not set(after["lost"]) & {device for stage in after["stages"] for device in stage["devices"]}
    assert after["moved_bytes"] == sum(size for _, _, size in after["transfers"])
    assert after["step_s"] > found["step_s"]
    ElementTree.parse(drawn)
    assert found["drawn_step_s"] == pytest.approx(after["step_s"], rel=0.25), "of the plan that is drawn, by another rule"
    assert f"{found['drawn_step_s']:.4g} s" in run(*FILES, "--svg", str(drawn), "--lose", "date").stdout
    told = run(*FILES, "--lose", "date")
    assert told.exit_code == 0
    assert "(bottleneck)" in told.stdout
    assert "GB move in" in told.stdout


def test_interpolation_and_profiles_from_a_file(tmp_path: Path):
    there = files.cluster(CLUSTERS / "mixed.toml")
    profiles = SMALL.profiles(there)
    only = Profiles(seconds={m: layers for m, layers in profiles.seconds.items() if m.kind == "A100-40"}, bytes=profiles.bytes)
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"batch": 64, **profiles_json(only)}))
    words = ("--cluster", str(CLUSTERS / "mixed.toml"), "--workload", str(path), "--json")
    refused = run(*words)
    assert refused.exit_code == 1
    assert "there is no profile for device kind V100-16" in refused.stderr
    guessed = run(*words, "--interpolate")
    assert guessed.exit_code == 0
    measured = plan_for(there, profiles, 64, SearchLimits())
    assert json.loads(guessed.stdout)["step_s"] == pytest.approx(measured.plan.step_s, rel=0.02)


@pytest.mark.parametrize(
    ("cluster_text", "work_text", "said"),
    [
        ("kinds = 3", "", "kinds must be a list of tables"),
        ("kinds = [", "", "is not TOML"),
        ("", "", "cluster.kinds is missing"),
        (None, "batch = 0", "batch must be a whole number"),
        (None, "batch = 8\ntransformer = 3", "transformer must be a table"),
        (None, "batch = 8\n[transformer]\nlayer = 2", "transformer.layer is not known"),
        (None, "batch = 8\n[transformer]\nlayers = 2", "transformer.hidden is missing"),
        (None, "batch = 8", "seconds"),
    ],
)
def test_bad_files_name_the_field(tmp_path: Path, cluster_text: str | None, work_text: str, said: str):
    one, two = tmp_path / "cluster.toml", tmp_path / "work.toml"
    one.write_text((CLUSTERS / "mixed.toml").read_text() if cluster_text is None else cluster_text)
    two.write_text(work_text)
    result = run("--cluster", str(one), "--workload", str(two))
    assert result.exit_code == 1
    assert said in result.stderr
    assert str(tmp_path) in result.stderr


def test_what_cannot_be_is_told(tmp_path: Path):
    assert "no device elm" in run(*FILES, "--lose", "elm").stderr
    assert "cannot be read" in run("--cluster", str(tmp_path / "none.toml"), "--workload", str(tmp_path / "none.toml")).stderr
    assert "cannot be written" in run(*FILES, "--svg", str(tmp_path / "no" / "where.svg")).stderr
    assert "must be at least 1" in run(*FILES, "--horizon", "0").stderr
    huge = tmp_path / "huge.toml"
    huge.write_text((CLUSTERS / "gpt-1.3b.toml").read_text().replace("hidden = 2048", "hidden = 65536"))
    said = run("--cluster", str(CLUSTERS / "mixed.toml"), "--workload", str(huge)).stderr
    assert "fits on no device, not even alone" in said
    assert "bytes short on" in said
