"""Tests torch's distributed checkpoints: written by torch and read by us, and the reverse."""

import pickle

import pytest
import torch

from elastic.checkpoint.convert.dcp import open_dcp
from elastic.checkpoint.convert.dcp_write import write_dcp
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.convert.run import Conversion, convert
from elastic.checkpoint.convert.torch_save import open_torch, write_torch
from elastic.errors import CheckpointError
from tests.checkpoint import peers

pytestmark = pytest.mark.filterwarnings("ignore")


def values(source):
    """Every tensor of a source, whole."""
    found = {}
    for name, states in source.contents.tensors.items():
        for state, spec in states.items():
            found[name, state] = source.read(name, state, 0, torch.Size(spec.shape).numel()).reshape(spec.shape)
    return found


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    peers.save_sharded(root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nested", "flat"])
def test_shards_of_fsdp2_are_what_torch_gathers(sharded, kind):
    weights, states = torch.load(sharded / "whole.pt", weights_only=True)
    source = open_dcp(sharded / kind)
    found = values(source)
    assert set(found) == {(name, state) for name in weights for state in ("param", "exp_avg", "exp_avg_sq")}
    for (name, state), value in found.items():
        expected = weights[name] if state == "param" else states["state"][name][state]
        assert torch.equal(value, expected), (name, state)
    assert source.contents.scalars == {name: {"step": 1.0} for name in weights}
    assert [list(group.names) for group in source.contents.groups] == [group["params"] for group in states["param_groups"]]
    assert [group.settings["weight_decay"] for group in source.contents.groups] == [0.01, 0.0]
    assert source.contents.step == 1
    assert "agree" in source.verify()
    source.close()


@pytest.mark.slow
def test_a_tensor_sharded_by_columns_is_read_by_any_run(sharded):
    source = open_dcp(sharded / "columns")
    for start in range(36):
        for stop in range(start, 36):
            assert source.read("columns", "param", start, stop).tolist() == [float(value) for value in range(start, stop)]
    source.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nested", "flat"])
@pytest.mark.parametrize("flat", [False, True])
def test_torch_loads_what_is_written_from_shards_and_takes_the_same_step(sharded, tmp_path, kind, flat):
    source = open_dcp(sharded / kind)
    write_dcp(source, tmp_path / "out")
    source.close()
    ours, theirs = peers.load_plain(tmp_path / "out", flat=flat), peers.load_plain(sharded / ("flat" if flat else "nested"), flat=flat)
    for module, optim in (ours, theirs):
        peers.train(module, optim, 1)
    assert peers.bits(ours[0]) == peers.bits(theirs[0])


@pytest.mark.parametrize("flat", [False, True])
def test_the_next_step_after_a_detour_has_the_same_bits(tmp_path, flat):
    module, optim = peers.trained()
    peers.save_plain(tmp_path / "a", module, optim, flat=flat, step=3, scheduler={"last": [1, 2], "pair": (1, None)})
    source = open_dcp(tmp_path / "a")
    write_torch(source, tmp_path / "b.pt")
    through = open_torch(tmp_path / "b.pt")
    write_dcp(through, tmp_path / "c")
    back = open_dcp(tmp_path / "c")
    assert back.contents == source.contents
    assert all(torch.equal(value, values(source)[key]) for key, value in values(back).items())
    loaded, restored = peers.load_plain(tmp_path / "c", flat=flat)
    peers.train(loaded, restored, 3)
    peers.train(module, optim, 3)
    assert peers.bits(loaded) == peers.bits(module)
    assert restored.param_groups[0]["betas"] == (0.8, 0.99)
    for opened in (source, through, back):
        opened.close()


def test_an_optimizer_itself_loads_the_file_and_takes_the_same_step(tmp_path):
    module, optim = peers.trained()
    peers.save_plain(tmp_path / "a", module, optim, flat=False)
    source = open_dcp(tmp_path / "a")
    write_torch(source, tmp_path / "b.pt")
    source.close()
    tree = torch.load(tmp_path / "b.pt", weights_only=True)
    fresh = peers.model(seed=5)
    fresh.load_state_dict(tree["model"])
    restored = peers.optimizer(fresh, lr=9.0)
    restored.load_state_dict(tree["optim"])
    for pair in ((module, optim), (fresh, restored)):
        peers.train(*pair, 3)
    assert peers.bits(fresh) == peers.bits(module)


@pytest.fixture
def plain(tmp_path):
    peers.save_plain(tmp_path / "a", *peers.trained(1), flat=False)
    return tmp_path / "a"


def test_a_flipped_bit_is_found_by_verify(plain):
    data = bytearray((plain / "__0_0.distcp").read_bytes())
    source = open_dcp(plain)
    data[source.tensors["0.weight", "param"].chunks[0][2]().offset + 7] ^= 1
    (plain / "__0_0.distcp").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        source.verify()
    source.close()


def test_a_truncated_file_is_refused(plain):
    file = plain / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        values(open_dcp(plain))


@pytest.mark.parametrize("cut", [0, 1, 100, 1000, -1])
def test_damaged_metadata_is_refused(plain, cut):
    file = plain / ".metadata"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="metadata"):
        open_dcp(plain)


class Hostile:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize("where", ["metadata", "value"])
def test_a_hostile_pickle_is_refused_and_does_not_run(plain, where, capsys):
    if where == "metadata":
        (plain / ".metadata").write_bytes(pickle.dumps(Hostile()))
    else:
        import torch.distributed.checkpoint as dcp

        dcp.save({"model": peers.model().state_dict(), "bad": Hostile()}, checkpoint_id=str(plain), no_dist=True)
    refusal = r"is not metadata" if where == "metadata" else r"builtin(s|__)\.print.*--trust-pickle"
    with pytest.raises(CheckpointError, match=refusal):
        open_dcp(plain)
    assert "it ran" not in capsys.readouterr().out


def test_a_path_outside_of_the_checkpoint_is_refused(plain):
    metadata = pickle.loads((plain / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../a/__0_0.distcp"
    (plain / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside"):
        open_dcp(plain)


def test_missing_chunks_are_refused(plain):
    metadata = pickle.loads((plain / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.0.weight"].chunks.clear()
    (plain / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"the chunks of model\.0\.weight do not tile it: its chunks hold 0 of 35"):
        open_dcp(plain)


def test_what_cannot_be_read_is_left_out_by_a_rule(plain, tmp_path):
    import torch.distributed.checkpoint as dcp

    weights = peers.model().state_dict()
    dcp.save({"model": weights, "bad": Hostile(), "extra": {"worse": Hostile(), "seed": 5}}, checkpoint_id=str(plain), no_dist=True)
    metadata = pickle.loads((plain / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.0.weight"].chunks.clear()
    (plain / ".metadata").write_bytes(pickle.dumps(metadata))
    rules = Rules(drop=("bad", r"extra\.worse", r"0\.weight"))
    convert(Conversion(source=plain, target=tmp_path / "b", to="torch", rules=rules))
    tree = torch.load(tmp_path / "b", weights_only=True)
    assert set(tree["model"]) == set(weights) - {"0.weight"}
    assert tree["extra"] == {"seed": 5}
    assert "bad" not in tree
