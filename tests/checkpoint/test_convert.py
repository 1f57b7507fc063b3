"""Tests whole conversions: torch files, rules, verification, memory."""

import argparse
import json
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint.convert.dcp import open_dcp
from elastic.checkpoint.convert.detect import detect
from elastic.checkpoint.convert.formats import TARGETS
from elastic.checkpoint.convert.jsonable import decode, encode
from elastic.checkpoint.convert.rules import parse_rules
from elastic.checkpoint.convert.run import Conversion, convert, open_any, plan
from elastic.checkpoint.convert.torch_save import open_torch, write_torch
from elastic.errors import CheckpointError
from tests.checkpoint import peers

pytestmark = pytest.mark.filterwarnings("ignore")


def whole(source, name, state="param"):
    spec = source.contents.tensors[name][state]
    return source.read(name, state, 0, spec.elements).reshape(spec.shape)


def save(path, *, model="model", optimizer="optimizer", **rest):
    module, optim = peers.trained()
    torch.save({model: module.state_dict(), optimizer: optim.state_dict(), **rest}, path)
    return module, optim


def test_numbered_parameters_of_several_groups_take_a_rule(tmp_path):
    module, optim = save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="by a rule"):
        open_torch(tmp_path / "a.pt")
    rules = parse_rules({"optimizer": {"groups": [r"^(0|3)\.weight$", ".*"]}})
    _, source = open_any(tmp_path / "a.pt", rules=rules)
    for name, parameter in module.named_parameters():
        assert torch.equal(whole(source, name, "exp_avg"), optim.state[parameter]["exp_avg"])
        assert source.contents.scalars[name] == {"step": 3.0}
    wrong = parse_rules({"optimizer": {"groups": ["bias", ".*"]}})
    with pytest.raises(CheckpointError, match="groups of"):
        open_any(tmp_path / "a.pt", rules=wrong)


@pytest.mark.parametrize(
    ("model", "optimizer"), [("state_dict", "optimizer_states"), ("model_state_dict", "optim"), ("module", "optimizer_state")]
)
def test_spellings_survive_a_detour(tmp_path, model, optimizer):
    module = peers.model()
    optim = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    peers.train(module, optim, 0)
    states = [optim.state_dict()] if optimizer == "optimizer_states" else optim.state_dict()
    extra = {"global_step": 5, "callbacks": {"x": (1, None)}, "rng": torch.arange(4, dtype=torch.uint8)}
    torch.save({model: module.state_dict(), optimizer: states, **extra}, tmp_path / "a.pt")
    rules = parse_rules({"optimizer": {"groups": [".*"]}})
    convert(Conversion(source=tmp_path / "a.pt", target=tmp_path / "b", to="dcp", rules=rules))
    convert(Conversion(source=tmp_path / "b", target=tmp_path / "c.pt", to="torch"))
    tree = torch.load(tmp_path / "c.pt", weights_only=True)
    assert tree["global_step"] == 5
    assert tree["callbacks"] == {"x": (1, None)}
    assert torch.equal(tree["rng"], extra["rng"])
    fresh = peers.model(seed=4)
    fresh.load_state_dict(tree[model])
    restored = torch.optim.SGD(fresh.parameters(), lr=7.0)
    restored.load_state_dict(tree[optimizer][0] if optimizer == "optimizer_states" else tree[optimizer])
    for pair in ((module, optim), (fresh, restored)):
        peers.train(*pair, 1)
    assert peers.bits(module) == peers.bits(fresh)


@pytest.mark.slow
def test_a_checkpoint_of_lightning_is_read(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 2)

        def training_step(self, batch, index):
            return self.net(batch[0]).square().sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 3)))
    module = Module()
    trainer = lightning.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    source = open_torch(tmp_path / "a.ckpt")
    assert source.contents.step == 2
    state = trainer.optimizers[0].state[module.net.weight]
    assert torch.equal(whole(source, "net.weight", "exp_avg"), state["exp_avg"])
    write_torch(source, tmp_path / "b.ckpt")
    lightning.Trainer(max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path).fit(
        Module(), data, ckpt_path=str(tmp_path / "b.ckpt"), weights_only=True
    )


def test_ties_are_one_tensor_and_written_under_both_names(tmp_path):
    shared = torch.randn(3, 2)
    torch.save({"wte": shared, "head": shared, "view": shared[1]}, tmp_path / "a.pt")
    source = open_torch(tmp_path / "a.pt")
    assert source.contents.ties == {"head": "wte"}
    assert torch.equal(whole(source, "view"), shared[1])
    write_torch(source, tmp_path / "b.pt")
    tree = torch.load(tmp_path / "b.pt", weights_only=True)
    assert tree["head"].data_ptr() == tree["wte"].data_ptr()
    convert(Conversion(source=tmp_path / "a.pt", target=tmp_path / "c", to="hf"))


@pytest.mark.parametrize("make", [lambda t: t.t(), lambda t: t[:, 1:3], lambda t: t[::2], lambda t: t[0].expand(3, 6), lambda t: t[0, 0]])
def test_tensors_of_any_strides_are_read(tmp_path, make):
    value = make(torch.arange(30.0).reshape(5, 6))
    torch.save({"x": value}, tmp_path / "a.pt")
    source = open_torch(tmp_path / "a.pt")
    flat = value.reshape(-1)
    for start in range(len(flat) + 1):
        assert torch.equal(source.read("x", "param", start, len(flat)), flat[start:])


LAZY = {
    "conjugate": lambda c: c.conj(),
    "conjugate, transposed": lambda c: c.conj().t(),
    "conjugate, part": lambda c: c[1:, ::2].conj(),
    "negative": lambda c: torch._neg_view(c.real.contiguous()),
    "negative by imag": lambda c: c.clone().conj().imag,
    "both": lambda c: torch._neg_view(c.conj()),
    "neither": lambda c: c,
}


@pytest.mark.parametrize("to", TARGETS)
def test_lazy_bits_are_applied(tmp_path, to):
    base = torch.complex(torch.randn(4, 6), torch.randn(4, 6))
    views = {name: make(base) for name, make in LAZY.items()}
    torch.save(views, tmp_path / "a.pt")
    expected = torch.load(tmp_path / "a.pt", weights_only=True)
    for trust in (False, True):
        _, source = open_any(tmp_path / "a.pt", trust_pickle=trust)
        assert not source.contents.ties
        for name, value in expected.items():
            assert torch.equal(whole(source, name), value.resolve_conj().resolve_neg())
            flat = value.resolve_conj().resolve_neg().reshape(-1)
            assert all(torch.equal(source.read(name, "param", at, at + 3), flat[at : at + 3]) for at in range(0, len(flat) - 3, 5))
        source.close()
    convert(Conversion(source=tmp_path / "a.pt", target=tmp_path / "b", to=to))
    _, written = open_any(tmp_path / "b")
    for name, value in expected.items():
        assert torch.equal(whole(written, name), value.resolve_conj().resolve_neg())
    written.close()


def test_lazy_bits_of_distributed_checkpoints_and_optimizer_states_are_applied(tmp_path):
    import torch.distributed.checkpoint as dcp

    base = torch.complex(torch.randn(4, 6), torch.randn(4, 6))
    dcp.save({"model": {"a": base.conj(), "b": base}}, checkpoint_id=str(tmp_path / "a"), no_dist=True)
    source = open_dcp(tmp_path / "a")
    assert torch.equal(whole(source, "a"), base.conj().resolve_conj())
    source.close()
    optimizer = {"state": {"w": {"exp_avg": base.conj()}}, "param_groups": [{"lr": 0.1, "params": ["w"]}]}
    torch.save({"model": {"w": base}, "optimizer": optimizer, "freqs": base.conj()}, tmp_path / "c.pt")
    _, source = open_any(tmp_path / "c.pt")
    assert torch.equal(whole(source, "w", "exp_avg"), base.conj().resolve_conj())
    assert torch.equal(decode(source.contents.extra["freqs"]), base.conj().resolve_conj())
    source.close()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_any_plain_value_is_json_and_back(value):
    assert repr(decode(json.loads(json.dumps(encode(value, "x"))))) == repr(value)


shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(shapes, st.sampled_from(["exp_avg", "momentum_buffer"]), st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=5)
)
def test_there_and_back_with_optimizer_state_is_bitwise(tmp_path_factory, drawn):
    root = tmp_path_factory.mktemp("r")
    model = {f"m.{index}": torch.randn(shape) for index, (shape, *_) in enumerate(drawn)}
    groups = [{"lr": 0.5, "betas": (0.1, 0.2), "name": str(which), "params": []} for which in range(2)]
    states = {}
    for index, (name, value) in enumerate(model.items()):
        _, state, which, number = drawn[index]
        groups[which]["params"].append(name)
        states[name] = {state: torch.randn_like(value), "step": torch.tensor(float(index)), "number": number}
    tree = {"model": model, "optimizer": {"state": states, "param_groups": groups}}
    torch.save(tree, root / "a.pt")
    convert(Conversion(source=root / "a.pt", target=root / "b", to="dcp"))
    convert(Conversion(source=root / "b", target=root / "c.pt", to="torch"))
    first, last = open_torch(root / "a.pt"), open_torch(root / "c.pt")
    assert first.contents == last.contents
    for name, held in first.contents.tensors.items():
        assert all(torch.equal(whole(first, name, state), whole(last, name, state)) for state in held)
    for source in (first, last):
        source.close()


RULES = {
    "drop": ["noise.*"],
    "rename": [{"regex": r"h\.(\d+)\.(.*)", "to": r"layers.\1.\2"}, {"exact": "x", "to": "y"}],
    "split": [{"name": "layers.0.qkv", "dim": 1, "widths": [4, 1, 1], "to": ["q", "k", ""]}],
    "merge": [{"names": ["q", "y"], "dim": 0, "to": "qy"}],
}


def test_rules_rename_split_merge_and_drop(tmp_path):
    model = {"h.0.qkv": torch.randn(3, 6), "x": torch.randn(2, 4), "noise.1": torch.ones(1)}
    torch.save(model, tmp_path / "a.pt")
    outline = convert(Conversion(source=tmp_path / "a.pt", target=tmp_path / "b", to="dcp", rules=parse_rules(RULES), max_memory=1 << 20))
    assert [(planned.name, planned.spec.shape) for planned in outline.tensors] == [("k", (3, 1)), ("qy", (5, 4))]
    source = open_dcp(tmp_path / "b")
    assert torch.equal(whole(source, "qy"), torch.cat([model["h.0.qkv"][:, :4], model["x"]]))
    assert torch.equal(whole(source, "k"), model["h.0.qkv"][:, 4:5])


def test_a_dropped_value_is_not_opened(tmp_path):
    model = {"a": torch.ones(4), "noise": torch.ones(3)}
    states = {name: {"exp_avg": torch.ones_like(value)} for name, value in model.items()} | {"noise": {"exp_avg": object}}
    optimizer = {"state": states, "param_groups": [{"lr": 0.1, "params": ["a", "noise"]}]}
    tree = {"model": model, "optimizer": optimizer, "args": argparse.Namespace(x=1), "deep": {"args": argparse.Namespace(), "seed": 3}}
    torch.save(tree, tmp_path / "a.pt")
    for drop in ([], ["noise"], ["noise", "args"]):
        with pytest.raises(CheckpointError, match=r"drop it by a rule|can be kept"):
            open_any(tmp_path / "a.pt", rules=parse_rules({"drop": drop}))
    _, source = open_any(tmp_path / "a.pt", rules=parse_rules({"drop": ["noise", r"(deep\.)?args"]}))
    assert list(source.contents.tensors) == ["a"]
    assert source.contents.groups[0].names == ("a",)
    assert source.contents.extra["deep"] == {"seed": 3}
    source.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"splits": []}, "unknown rule 'splits'"),
        ({"split": [{"name": "a", "dim": 0, "widths": [1, 2], "to": ["x", "y"]}]}, r"split 'a'.*do not fill dimension 0"),
        ({"split": [{"name": "z", "dim": 0, "widths": [1], "to": ["x"]}]}, "no such tensor"),
        ({"merge": [{"names": ["a", "b"], "dim": 1, "to": "c"}]}, "do not join along dimension 1"),
        ({"rename": [{"regex": "(", "to": "x"}]}, "regular expression"),
        ({"rename": [{"regex": ".*", "to": "x"}]}, "two tensors to x"),
        ({"rename": [{"exact": "a"}]}, "exact or regex"),
        ({"split": [{"name": "a", "dim": 0, "widths": [0, 4], "to": ["x", "y"]}]}, "positive width"),
    ],
)
def test_rules_that_do_not_fit_are_refused(tmp_path, data, reason):
    torch.save({"a": torch.ones(4, 2), "b": torch.ones(3, 2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=reason):
        plan(Conversion(source=tmp_path / "a.pt", target=tmp_path / "b", to="dcp", rules=parse_rules(data)))


def test_a_split_divides_optimizer_states_and_groups_as_well(tmp_path):
    tree = {"state": {"qkv": {"exp_avg": torch.arange(6.0), "step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "params": ["qkv"]}]}
    torch.save({"model": {"qkv": torch.ones(6)}, "optimizer": tree}, tmp_path / "a.pt")
    rules = parse_rules({"split": [{"name": "qkv", "dim": 0, "widths": [2, 4], "to": ["q", "kv"]}]})
    _, source = open_any(tmp_path / "a.pt", rules=rules)
    assert source.contents.groups[0].names == ("q", "kv")
    assert source.contents.scalars == {"q": {"step": 2.0}, "kv": {"step": 2.0}}
    assert whole(source, "kv", "exp_avg").tolist() == [2, 3, 4, 5]


def test_nothing_is_replaced_and_nothing_is_left_after_a_failure(tmp_path):
    torch.save({"a": torch.ones(4)}, tmp_path / "a.pt")
    (tmp_path / "b").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        convert(Conversion(source=tmp_path / "a.pt", target=tmp_path / "b", to="torch"))
    assert (tmp_path / "b").read_text() == "mine"
    torch.save({"a": torch.ones(4, dtype=torch.complex128)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="a has dtype complex128"):
        convert(Conversion(source=tmp_path / "c.pt", target=tmp_path / "d", to="hf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b", "c.pt"]


def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path):
    for name, reason in (("x", "does not exist"), ("", "Looked for: elastic: manifest.json")):
        with pytest.raises(CheckpointError, match=reason):
            detect(tmp_path / name)
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no \.metadata, so its save did not finish"):
        detect(tmp_path)


MEASURE = """
import sys
from pathlib import Path
from elastic.checkpoint.convert.run import Conversion, convert
convert(Conversion(source=Path(sys.argv[1]), target=Path(sys.argv[2]), to=sys.argv[3], max_memory=int(sys.argv[4])))
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
"""Prints the peak in KiB. Not ru_maxrss: that begins with what the process that made this one had."""


def sparse(path, count, elements):
    """A file of safetensors with zeros, without their bytes on the disk."""
    entries = {
        f"m{i}": {"dtype": "F32", "shape": [elements // 1024, 1024], "data_offsets": [4 * i * elements, 4 * (i + 1) * elements]}
        for i in range(count)
    }
    header = json.dumps(entries).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + 4 * count * elements)


@pytest.mark.slow
@pytest.mark.parametrize("to", [pytest.param(to, marks=[] if to == "elastic" else pytest.mark.long) for to in TARGETS])
def test_ten_times_the_memory_is_converted_within_it(tmp_path, to):
    limit = 24 << 20
    sparse(tmp_path / "a.safetensors", 2, 5 * limit // 4)
    arguments = [sys.executable, "-c", MEASURE, tmp_path / "a.safetensors", tmp_path / "b", to, str(limit)]
    result = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert int(result.stdout) << 10 < limit + (300 << 20)
    shutil.rmtree(tmp_path / "b") if (tmp_path / "b").is_dir() else (tmp_path / "b").unlink()
