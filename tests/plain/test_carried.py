"""Tests that the user is told which variables a loop carries from body to body, or from epoch to epoch."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from torch.nn import functional

from elastic.worker.job import Job
from elastic.worker.plain.carried import by_bodies, by_epochs
from tests.plain import loops
from tests.recovery import forks

BODY = """
for i, (x, y) in enumerate(tqdm(loader)):
    x = x.to(device)
    loss = criterion(model(x), y)
    loss += penalty(model)
    loss = loss / 2
    {}
    loss.backward()
    optimizer.step()
    if (report := loader.report) is not None and job.leader:
        seen += 1
        print(i)
"""


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("pass", []),
        ("running += loss.item()", ["running"]),
        ("self.seen += 1", ["self.seen"]),
        ("totals['loss'] += loss.item()", ["totals['loss']"]),
        ("seen = seen + len(x)", ["seen"]),
        ("a, b = a + 1, 0", ["a"]),
        ("hidden = model(x, hidden)", ["hidden"]),
        ("if loss > 9: seen += 1", ["seen"]),
        ("if best > loss: best = loss", ["best"]),
        ("if (n := n + 1) > 9: pass", ["n"]),
        ("if (n := f(x)) > 9 and n < 12: print(n)", []),
        ("for part in parts: n = 0; n += part", []),
        ("for part in parts: total += part", ["total"]),
        ("parts = [part for part in x]; part = 1; print(part)", []),
        ("f = lambda a: a + 1; a = f(x)", []),
        ("with torch.no_grad(): mean = 0.9 * mean + loss", ["mean"]),
        ("try: z = f(x)\n    except ValueError: z = 0\n    print(z)", []),
        ("try: z = f(x)\n    except ValueError: pass\n    print(z)", ["z"]),
        ("if loss > 9: z = 1\n    else: z = 2\n    print(z)", []),
        ("if accelerator.sync_gradients: seen += 1", []),
        ("def f(): nonlocal n; n += 1", []),
    ],
)
def test_what_is_carried_from_body_to_body_is_found_in_the_source(statement: str, found: list[str]) -> None:
    enumerated = ["i of enumerate(tqdm(loader))"]  # it is used under `if loader.report`
    assert list(by_bodies(BODY.format(statement), 2)) == enumerated + found
    assert list(by_bodies(BODY.format(statement), 3)) == enumerated + found  # by next(), say
    assert by_bodies(BODY.format(statement), 1) == {}
    assert list(by_bodies(BODY.replace("print(i)", "pass").format(statement), 2)) == found


EPOCHS = """
def train(job):
    best, kept = 9, None
    for epoch in loader.epochs(9):
        {}
        for x, y in loader:
            loss = step(x, y)
        print(loss)
        {}
    return kept
"""


@pytest.mark.parametrize(
    ("before", "behind", "found"),
    [
        ("pass", "pass", []),
        ("total = 0", "total += loss", []),
        ("pass", "beta *= 0.9", ["beta"]),
        ("pass", "if loss < best: best, kept = loss, copy(model)", ["best", "kept"]),
        ("pass", "if job.leader and loss < best: best = loss; torch.save(model.state_dict(), path)", ["best"]),
        ("pass", "if job.leader: found = loss; print(found)", []),
        ("pass", "kept = copy(model)", []),
        ("pass", "best = min(best, loss)", ["best"]),
        ("if epoch and bad > 3: break", "bad = 0 if loss < 1 else bad + 1", ["bad"]),
        ("for x in range(3): n = x; m = n", "pass", []),
        ("pass", "if loss < self.best: self.best = loss", ["self.best"]),
        ("pass", "if loss < state['best']: state['best'] = loss", ["state['best']"]),
        ("pass", "if not found or loss < found[0]: found[:] = [loss]", ["found"]),
        ("pass", "if best is None or loss < best['v']: best = {{'v': loss}}", ["best"]),
        ("pass", "losses.append(loss); print(min(losses))", ["losses"]),
        ("pass", "losses.append(loss)", []),
        ("losses = []", "losses.append(loss); print(min(losses))", []),
        ("pass", "state.update(best=loss); print(state['best'], state)", ["state"]),
        ("pass", "metric.update(loss); print(metric)", []),
        ("pass", "best, bad = (loss, 0) if loss < best else (best, bad + 1)", ["best", "bad"]),
        ("pass", "match loss < best:\n            case True: best = loss", ["best"]),
        ("pass", "for group in optimizer.param_groups: group['lr'] *= 0.9", []),
        ("pass", "optimizer.param_groups[0]['lr'] *= 0.9", []),
        ("total = 0", "print(total)", []),
    ],
)
def test_what_is_carried_from_epoch_to_epoch_is_found_too(before: str, behind: str, found: list[str]) -> None:
    assert list(by_epochs(EPOCHS.format(before, behind), 6)) == found


def test_what_is_carried_from_step_to_step() -> None:
    source = "for x in loader:\n  if loader.report is not None:\n    last = seen\n    seen += 1\n    if seen > 9: lr = 1\nprint(lr, last)\n"
    assert by_epochs(source, 1) == {"seen": 4, "lr": 5}
    assert by_bodies(source, 1) == {}
    mean = "for epoch in epochs:\n  total = 0\n  for x in loader:\n    if loader.report is not None: total += 1\n  print(total)\n"
    assert by_epochs(mean, 3) == {}  # a part of one epoch's, to be printed


def test_what_the_runtime_has_may_be_carried() -> None:
    source = "net, opt, loader = job.prepare(net, opt, data)\nbest = loader.keep_best()\nloader.register_for_checkpointing(stopper)\n"
    source += "it = iter(loader)\nwhile True:\n  net.p *= 2\n  best.n += 1\n  stopper.bad = stopper.bad + 1\n"
    source += "  try: x = next(it)\n  except StopIteration:\n    it = iter(loader)\n    x = next(it)\n  other.n += 1\n"
    assert by_bodies(source, 9) == {"other.n": 13}


def test_loops_over_several_lines_around_definitions_and_in_helpers() -> None:
    source = "for epoch in range(2):\n  n += 1\n  for x in (\n    loader\n  ):\n    k += 1\n"
    assert [by_bodies(source, line) for line in (1, 3, 4)] == [{"n": 2, "k": 6}, {"k": 6}, {"k": 6}]
    assert by_epochs(source, 4) == {"n": 2, "k": 6}
    assert by_epochs(source, 1) == {"n": 2, "k": 6}
    nested = "for fold in folds:\n  n += 1\n  def f():\n    for x in loader:\n      k += 1\n  f()\n"
    assert by_epochs(nested, 4) == {"k": 5}
    assert by_epochs(nested, 6) == {"n": 2}
    assert by_bodies("for x in", 1) == by_epochs("for x in", 1) == {}


def steps(net: Any, optimizer: Any, loader: Any) -> None:
    seen = 0
    for x, y in loader:
        seen += len(x)
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def training(job: Job) -> dict[str, Any]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("elastic.worker.plain").addHandler(handler)
    net, beta = loops.model(), 1.0
    net, optimizer, loader = job.prepare(net, loops.adamw(net), loops.Rows(), **loops.SIZES)
    for _ in loader.epochs(2):
        steps(net, optimizer, loader)
        beta *= 0.9
    for _ in loader.epochs(2):
        steps(net, optimizer, loader)
        beta *= 0.8
    return {"told": told}


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
def test_one_worker_tells_the_user_where_the_first_loop_begins() -> None:
    def prepare(job: Job) -> None:
        job.profile = job.worker == 0

    agent = forks.run(2, train=training, prepare=prepare)
    bodies, epochs, second = agent.results[0]["told"]
    line = steps.__code__.co_firstlineno + 3
    assert bodies.startswith(f"{__file__}: the body of the loop counts by itself: seen (line {line}). It runs")
    assert epochs.startswith(
        f"{__file__}: the loop carries variables from turn to turn: beta (line {training.__code__.co_firstlineno + 9}). A"
    )
    assert f"turn to turn: beta (line {training.__code__.co_firstlineno + 12}). A" in second
    assert agent.results[1]["told"] == []
