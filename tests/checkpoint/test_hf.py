"""Tests Hugging Face directories: written by the real library if it is installed, and hostile ones written by hand."""

import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint.convert.dcp import open_dcp
from elastic.checkpoint.convert.dcp_write import write_dcp
from elastic.checkpoint.convert.hf import open_hf, write_hf
from elastic.checkpoint.convert.hf_weights import INDEX, SINGLE
from elastic.checkpoint.convert.safetensors_file import open_file
from elastic.checkpoint.convert.torch_save import open_torch, write_torch
from elastic.checkpoint.dtypes import dtype_of
from elastic.checkpoint.files import CODES
from elastic.checkpoint.stored import Files
from elastic.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")


def save(path, tensors, shards=1):
    from safetensors.torch import save_file

    path.mkdir()
    names = list(tensors)
    if shards == 1:
        save_file(tensors, path / SINGLE, metadata={"format": "pt"})
        return path
    mapping = {name: f"model-{position % shards}.safetensors" for position, name in enumerate(names)}
    for file in set(mapping.values()):
        save_file({name: tensors[name] for name in names if mapping[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": mapping}))
    return path


def whole(source, name):
    spec = source.contents.tensors[name]["param"]
    return source.read(name, "param", 0, spec.elements).reshape(spec.shape)


def random_tensor(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


tensors = st.dictionaries(
    st.text("abc.0", min_size=1, max_size=6),
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(sorted(CODES)), st.integers(0, 99)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=25, deadline=None)
@given(tensors, st.integers(1, 3))
def test_there_and_back_through_every_format_is_bitwise(tmp_path_factory, drawn, shards):
    root = tmp_path_factory.mktemp("there")
    values = {name: random_tensor(shape, dtype_of(dtype), seed) for name, (shape, dtype, seed) in drawn.items()}
    opened = [open_hf(save(root / "a", values, shards))]
    for position, (write, read) in enumerate([(write_dcp, open_dcp), (write_torch, open_torch), (write_hf, open_hf)]):
        write(opened[-1], root / f"{position}")
        opened.append(read(root / f"{position}"))
    for name, value in values.items():
        for source in opened:
            assert whole(source, name).shape == value.shape
            assert whole(source, name).dtype == value.dtype
            assert torch.equal(whole(source, name).reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    for source in opened:
        source.close()


def test_safetensors_opens_what_is_written(tmp_path):
    from safetensors.torch import load_file

    values = {"a": torch.arange(3, dtype=torch.int8), "b": torch.randn(2, 2), "c": torch.randn(5).bfloat16()}
    source = open_hf(save(tmp_path / "a", values))
    write_hf(source, tmp_path / "b")
    found = load_file(tmp_path / "b" / SINGLE)
    assert all(torch.equal(found[name], value) for name, value in values.items())
    source.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_from_pretrained_opens_the_directory_with_equal_logits(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=1)
        model = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes))
    model.eval().save_pretrained(tmp_path / "a", max_shard_size="5KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    source = open_hf(tmp_path / "a")
    write_dcp(source, tmp_path / "b")
    through = open_dcp(tmp_path / "b")
    write_hf(through, tmp_path / "c", shard=6000)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(12)[None]
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    for opened in (source, through):
        opened.close()


@pytest.mark.slow
def test_a_directory_of_the_trainer_is_read_with_its_optimizer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from elastic.checkpoint.convert.numbered import Order
    from elastic.checkpoint.convert.rules import Rules
    from elastic.checkpoint.convert.trainer import open_trainer

    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=1)
    model = transformers.GPT2LMHeadModel(config)
    rows = [{"input_ids": torch.arange(6) + row, "labels": torch.arange(6) + row} for row in range(4)]
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "o"), max_steps=2, save_steps=2, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    where = tmp_path / "o" / "checkpoint-2"
    source = open_trainer(where)
    (where / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match="by a rule"):
        open_trainer(where)
    order = Order(names=tuple(group.names for group in source.contents.groups))
    assert open_trainer(where, rules=Rules(order=order)).contents.groups == source.contents.groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in trainer.optimizer.optimizer.param_groups] == [
        list(group.names) for group in source.contents.groups
    ]
    for name, parameter in model.named_parameters():
        expected = trainer.optimizer.optimizer.state[parameter]["exp_avg"]
        assert torch.equal(source.read(name, "exp_avg", 0, parameter.numel()), expected.reshape(-1))
    assert source.contents.step == 2
    source.close()


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": ENTRY}, bytes(7)),
        ({"a": ENTRY}, bytes(9)),
        ({"a": ENTRY, "b": ENTRY}, bytes(8)),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8)),
        ({"a": {**ENTRY, "shape": [-2]}}, bytes(8)),
        ({"a": {**ENTRY, "shape": [1 << 62, 4]}}, bytes(8)),
        ({"a": {**ENTRY, "dtype": "Q9"}}, bytes(8)),
        ({"a": {**ENTRY, "shape": [2.0]}}, bytes(8)),
        ({"a": 3}, b""),
        ({"__metadata__": {"x": 1}}, b""),
        (b"[]", b""),
        (b"[" * 100_000, b""),
        (b'{"a": {}, "a": {}}', b""),
        (b"\xff\xfe", b""),
    ],
)
def test_a_hostile_header_is_refused(tmp_path, header, data):
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        open_file(header_file(tmp_path / "x.safetensors", header, data), Files())


@pytest.mark.parametrize("data", [b"", bytes(8), struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_a_header_of_impossible_length_is_refused(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        open_file(tmp_path / "x.safetensors", Files())


@pytest.mark.parametrize("file", ["../model-0.safetensors", "/etc/passwd", 3])
def test_an_index_that_leaves_its_directory_is_refused(tmp_path, file):
    save(tmp_path / "a", {"x": torch.zeros(1), "y": torch.zeros(1)}, 2)
    (tmp_path / "a" / INDEX).write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(CheckpointError, match="in its directory"):
        open_hf(tmp_path / "a")


def test_an_index_that_disagrees_with_a_file_is_refused(tmp_path):
    save(tmp_path / "a", {"x": torch.zeros(1), "y": torch.zeros(1)}, 2)
    (tmp_path / "a" / INDEX).write_text(json.dumps({"weight_map": {"x": "model-0.safetensors", "z": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match="disagree about y"):
        open_hf(tmp_path / "a")
