"""Tests the command line for checkpoints."""

import json
import os
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import torch
from typer.testing import CliRunner

from elastic.checkpoint.cli import app, parse_bytes
from elastic.checkpoint.convert.run import Conversion
from elastic.checkpoint.objects import open_store
from elastic.errors import CheckpointError
from tests.checkpoint import peers

pytestmark = pytest.mark.filterwarnings("ignore")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture
def source(tmp_path):
    module, optim = peers.trained()
    peers.save_plain(tmp_path / "a", module, optim, flat=False, step=3)
    return tmp_path / "a"


def test_inspect_tells_format_step_and_groups(source):
    text = run("inspect", source)
    assert "format dcp (it has a file .metadata), step 3" in text
    assert "weight_decay=0.01" in text
    found = json.loads(run("inspect", source, "--json"))
    assert found["format"] == "dcp"
    assert [len(group["names"]) for group in found["groups"]] == [2, 4]
    assert found["tensors"]["0.weight"]["exp_avg"] == {"shape": [7, 5], "dtype": "float32"}


def test_convert_there_and_diff_finds_nothing(source, tmp_path):
    assert "would write 18 tensors" in run("convert", source, tmp_path / "b.pt", "--to", "torch", "--dry-run")
    assert not (tmp_path / "b.pt").exists()
    assert "wrote 18 tensors" in run("convert", source, tmp_path / "b.pt", "--to", "torch", "--max-memory", "1MiB")
    assert "0 different" in run("diff", source, tmp_path / "b.pt")
    text = run("convert", source, tmp_path / "c", "--to", "hf")
    assert "left out, because hf cannot hold it: 12 tensors of optimizer state" in text


def test_diff_says_what_and_where_and_fails(source, tmp_path):
    run("convert", source, tmp_path / "b.pt", "--to", "torch")
    tree = torch.load(tmp_path / "b.pt", weights_only=True)
    tree["model"]["0.weight"][2, 3] += 0.5
    tree["optim"]["param_groups"][1]["lr"] = 4.0
    tree["model"]["more"] = torch.zeros(1)
    del tree["model"]["3.bias"]
    tree["optim"] = {"state": {}, "param_groups": [{**group, "params": [], "param_names": []} for group in tree["optim"]["param_groups"]]}
    torch.save(tree, tmp_path / "c.pt")
    text = run("diff", source, tmp_path / "c.pt", code=1)
    assert "0.weight: 1 of 35 elements differ, the first at [2, 3], the largest absolute difference is 0.5" in text
    assert "more: only in the second" in text
    assert "3.bias: only in the first" in text
    assert "lr is 0.01 and 4.0" in text


def test_verify_says_what_it_proves(source, tmp_path):
    assert "CRC-32 of" in run("verify", source)
    run("convert", source, tmp_path / "c", "--to", "hf")
    assert "the format has no checksums" in run("verify", tmp_path / "c")


def test_rules_come_from_a_file(source, tmp_path):
    (tmp_path / "rules.toml").write_text('[[rename]]\nregex = "0\\\\.(.*)"\nto = "first.\\\\1"\n')
    run("convert", source, tmp_path / "b.pt", "--to", "torch", "--rules", tmp_path / "rules.toml")
    assert "first.weight" in torch.load(tmp_path / "b.pt", weights_only=True)["model"]


def test_a_pickle_that_must_be_trusted_is_refused_until_it_is(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "odd": Counter("aab")}, tmp_path / "a.pt")
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "a.pt"), str(tmp_path / "b"), "--to", "hf"])
    assert isinstance(result.exception, CheckpointError)
    assert "collections.Counter" in str(result.exception)
    assert "not read: odd is a collections.Counter" in run("inspect", tmp_path / "a.pt")
    assert "also holds: odd" in run("inspect", tmp_path / "a.pt", "--trust-pickle")


@pytest.mark.parametrize(("text", "count"), [("2GiB", 2 << 30), ("500 MB", 500_000_000), ("1.5k", 1536), ("7", 7)])
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


ELASTIC = [str(Path(sys.executable).parent / "elastic"), "checkpoint"]
MODULE = [sys.executable, "-m", "elastic.checkpoint"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments", "reason"),
    [
        (MODULE, ["inspect", "x"], "x does not exist"),
        (ELASTIC, ["inspect", "x"], "x does not exist"),
        (ELASTIC, ["convert", __file__, "out", "--to", "hf"], "is not a checkpoint of a known format"),
    ],
)
def test_a_refusal_is_one_line_of_either_command(tmp_path, command, arguments, reason):
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


def refused(capsys, *arguments):
    """Returns the one line with which a command refuses."""
    with pytest.raises(SystemExit) as ended:
        elastic_main(["checkpoint", *map(str, arguments)])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def elastic_main(arguments):
    from elastic.cli.main import app as whole

    whole(arguments, prog_name="elastic")


def test_every_command_refuses_in_one_line(source, tmp_path, capsys):
    (tmp_path / "rules.toml").write_text("[[split]]\nname = 'z'\ndim = 0\nwidths = [1]\nto = ['x']\n")
    (tmp_path / "bad.toml").write_text("=")
    (tmp_path / "locked").mkdir(mode=0)
    damaged = tmp_path / "damaged"
    run("convert", source, damaged, "--to", "elastic")
    for file in damaged.glob("step-*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    missing = tmp_path / "x"
    for arguments in (
        ["verify", missing],
        ["diff", source, missing],
        ["gc", missing],
        ["convert", missing, tmp_path / "out", "--to", "nosuch"],
        ["convert", source, tmp_path / "out", "--to", "hf", "--max-memory", "much"],
        ["convert", source, source, "--to", "hf"],
        ["convert", source, tmp_path / "rules.toml" / "below", "--to", "hf"],
        ["inspect", source, "--rules", tmp_path / "rules.toml"],
        ["inspect", source, "--rules", tmp_path / "bad.toml"],
        ["inspect", source, "--rules", missing],
        ["diff", source, source, *(["--rules", tmp_path / "rules.toml"] * 3)],
        ["inspect", "nosuch://x/y"],
        ["verify", damaged],
        *([["inspect", tmp_path / "locked" / "x"]] if os.geteuid() else []),
    ):
        refused(capsys, *arguments)


def test_commands_take_urls(source, tmp_path):
    url = f"memory://{uuid.uuid4().hex}/run"
    try:
        assert "wrote 18 tensors" in run("convert", source, url, "--to", "elastic")
        assert "format elastic (it is a URL), step 3" in run("inspect", url)
        assert "0 different" in run("diff", source, url)
        assert url in run("verify", url)
        (name,) = open_store(url).names("")[1:]
        assert "0 different" in run("diff", f"{url}/{name}", f"file://{source}")
        assert "wrote 6 tensors" in run("convert", url, tmp_path / "hf", "--to", "hf").replace("18 tensors", "6 tensors")
        run("convert", url, f"file://{tmp_path}/back", "--to", "elastic")
        assert "0 different" in run("diff", url, tmp_path / "back")
        assert "nothing to remove" in run("gc", url, "--keep-last", 1)
        open_store(url).put("step-00000009-e0-a0-0123456789abcdef/.token", b"died")
        assert "removed step-00000009-e0-a0-0123456789abcdef" in run("gc", url, "--older-than", -60)
        with pytest.raises(CheckpointError, match="only the format elastic can be written to URLs"):
            Conversion(source=source, target=url, to="hf")
        result = CliRunner().invoke(app, ["inspect", f"{url}/nothing"])
        assert "has no checkpoint" in str(result.exception)
    finally:
        fsspec.filesystem("memory").rm(url.removesuffix("/run"), recursive=True)
