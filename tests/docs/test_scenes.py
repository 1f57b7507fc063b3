"""Code of the documents that needs something around it: the quick start from its first line to its last, loops, alerts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from elastic.observe.metrics import described
from tests.conftest import Leftovers
from tests.docs.blocks import ROOT, blocks
from tests.docs.test_blocks import DEFINED, MODEL

ELASTIC = [sys.executable, "-m", "elastic.cli.main"]


def called(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def block_with(page: str, words: str) -> str:
    (found,) = [each.text for each in blocks(ROOT / "docs" / page) if words in each.text and each.language != "diff"]
    return found


def test_alerts_name_metrics_that_there_are() -> None:
    rules = yaml.safe_load(block_with("operations.md", "alert:"))["groups"][0]["rules"]
    kinds = {name: (kind, labels) for name, kind, labels, _ in described()}
    for rule in rules:
        name, label = re.findall(r'(elastic_\w+)(?:\{(\w+)="\w+"\})?', rule["expr"])[0]
        kind, labels = kinds[name]
        assert kind == "counter", "increase() is of counters"
        assert not label or label in labels


def elastic(text: str) -> list[str]:
    """Returns the words of a shell block's first command, which is `elastic`."""
    first, *words = text.split("\n")[0].split()
    assert first == "elastic"
    return [*ELASTIC, *words]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_quick_start_runs_from_its_first_line_to_its_last(tmp_path: Path, leftovers: Leftovers) -> None:
    script = next(each for each in blocks(ROOT / "docs" / "quickstart.md", "python") if each.words == "file=train.py").text
    (tmp_path / "train.py").write_text(script)
    digest = called([sys.executable, "train.py"], tmp_path).splitlines()[-1]
    assert re.fullmatch("[0-9a-f]{64}", digest)
    without = "\n".join(script.rstrip().splitlines()[:-2])
    (tmp_path / "train.py").write_text(without)
    named = elastic(block_with("quickstart.md", "--workers 4 --stages 2"))
    assert called(named, tmp_path).splitlines()[-1] == json.dumps(digest)
    assert called([*named, "--workers", "1", "--stages", "1"], tmp_path).splitlines()[-1] == json.dumps(digest)

    (tmp_path / "train.py").write_text(without.replace("steps=200", "steps=3000").replace("step % 50 == 49", "step == 1000"))
    calm = called([*named, "--workers", "1", "--stages", "1"], tmp_path).splitlines()[-1]
    started = subprocess.Popen(
        elastic(block_with("quickstart.md", "--report report.html")), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        said = kill_one(started, tmp_path)
    finally:
        started.kill()
    assert said.splitlines()[-1] == calm
    incidents = [json.loads(line)["kind"] for line in (tmp_path / "runs/first/incidents.jsonl").read_text().splitlines()]
    assert "death" in incidents
    assert "died" in called([*ELASTIC, "events", "runs/first"], tmp_path)
    assert "step 1000" in called([*ELASTIC, "logs", "runs/first"], tmp_path)
    assert "<svg" in (tmp_path / "report.html").read_text()


def kill_one(job: subprocess.Popen[str], folder: Path) -> str:
    """Kills a worker of the table behind step 1000. Returns what the job prints."""
    assert job.stdout is not None
    line = job.stdout.readline()
    assert line.startswith("step 1000"), line
    shown = json.loads(called([*ELASTIC, "top", "runs/first", "--json"], folder))
    os.kill(shown["workers"][-1]["pid"], signal.SIGKILL)
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 0
    return said


@pytest.mark.long
def test_a_whole_script_of_the_page_of_plain_loops_runs(tmp_path: Path, leftovers: Leftovers) -> None:
    prepared = block_with("dropin.md", "elastic.current_job()").replace("...  # model, optimizer and DataLoader as before", MODEL)
    loop = (
        "    for x, y in loader:\n        nn.functional.cross_entropy(model(x), y).backward()\n        optimizer.step()\n"
        "        optimizer.zero_grad()\n"
        "    digest = loader.digest()\n    if job.leader:\n        print(digest)\n"
    )
    (tmp_path / "script.py").write_text(DEFINED + prepared + loop)
    one, two = (called([*ELASTIC, "run", "script.py", "--workers", count, "--", "--lr", "1e-3"], tmp_path) for count in ("1", "2"))
    assert one == two
    assert re.fullmatch("[0-9a-f]{64}\n", one)


@pytest.mark.long
def test_the_body_of_the_page_of_plain_loops_runs(tmp_path: Path, leftovers: Leftovers) -> None:
    body = block_with("dropin.md", "job.clip_grad_norm_(1.0)").replace("1000 == 0", "3 == 0")
    before = (
        "def train(job):\n    " + MODEL + "\n    functional = nn.functional\n    test = dataset\n"
        "    def accuracy(model, data):\n        x, y = data.tensors\n        return float((model(x).argmax(1) == y).float().mean())\n"
        "    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)\n"
        "    sizes = {'micro_batch_size': 8, 'steps': 8}\n"
        "    model, optimizer, loader, scheduler = job.prepare(model, optimizer, loader, scheduler=scheduler, **sizes)\n"
    )
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    (tmp_path / "script.py").write_text(DEFINED + before + indented + "    return loader.digest()\n")
    one, two = (called([*ELASTIC, "run", "script.py:train", "--workers", count], tmp_path).splitlines() for count in ("1", "2"))
    assert one[-1] == two[-1] != "null"
    assert sum(line.startswith("0 ") for line in two) == 1, "the leader prints step 0"
    assert len(two) == 1 + 2 * 3 + 1, "both workers print the accuracy of steps 0, 3 and 6"


@pytest.mark.long
def test_the_trainer_of_the_page_of_models_runs(tmp_path: Path, leftovers: Leftovers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    transformers = pytest.importorskip("transformers", reason="make test-peers")
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "model")
    before = (
        "import torch, elastic\nfrom transformers import AutoModelForCausalLM\n\n\n"
        "class Rows(torch.utils.data.Dataset):\n    def __len__(self):\n        return 64\n\n    def __getitem__(self, index):\n"
        "        ids = (torch.arange(8) + index) % 32\n"
        "        return {'input_ids': ids, 'attention_mask': torch.ones(8).long(), 'labels': ids}\n\n\n"
        "def train(job):\n    directory, dataset = 'model', Rows()\n"
    )
    block = "".join(f"    {line}\n" for line in block_with("models.md", "elastic.token_loss").splitlines())
    after = "    for _ in trainer.run(steps=2):\n        pass\n    return trainer.digest()\n"
    (tmp_path / "script.py").write_text(before + block + after)
    assert re.fullmatch('"[0-9a-f]{64}"\n', called([*ELASTIC, "run", "script.py:train", "--workers", "2", "--stages", "2"], tmp_path))


@pytest.mark.long
def test_a_test_of_the_page_of_chaos_passes(tmp_path: Path, leftovers: Leftovers) -> None:
    text = (ROOT / "docs" / "chaos.md").read_text().partition("## In your own suite\n")[2].partition("\npytest finds")[0]
    (tmp_path / "test_it.py").write_text("".join(f"{line[4:]}\n" for line in text.splitlines()))
    example = (ROOT / "examples" / "chaos_suite" / "train.py").read_text()
    (tmp_path / "train.py").write_text(example)
    plugin = ["-p", "elastic.chaos.pytest_plugin", "-p", "no:cacheprovider"]
    said = called([sys.executable, "-m", "pytest", "-q", *plugin, "test_it.py"], tmp_path)
    assert "1 passed" in said
