"""Tests that a body which counts by itself is told of."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from torch.nn import functional

from elastic.worker.job import Job
from elastic.worker.plain.counting import counts
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
        seen += len(x)
        print(i)
"""


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("pass", []),
        ("running += loss.item()", ["running += loss.item()"]),
        ("self.seen += 1", ["self.seen += 1"]),
        ("totals['loss'] += loss.item()", ["totals['loss'] += loss.item()"]),
        ("seen = seen + len(x)", ["seen = seen + len(x)"]),
        ("a, b = a + 1, 0", ["a, b = (a + 1, 0)"]),
        ("hidden = model(x, hidden)", ["hidden = model(x, hidden)"]),
        ("if loss > 9: seen += 1", ["seen += 1"]),
        ("if i % 9 == 0: print(loss)", ["i of enumerate(tqdm(loader))"]),
        ("for part in parts: n = 0; n += part", []),
        ("for part in parts: total += part", ["total += part"]),
        ("with torch.no_grad(): mean = 0.9 * mean + loss", ["mean = 0.9 * mean + loss"]),
        ("if accelerator.sync_gradients: seen += 1", []),
        ("def f(): nonlocal n; n += 1", []),
    ],
)
def test_what_a_body_counts_is_found_in_its_source(statement: str, found: list[str]) -> None:
    assert [text for _, text in counts(BODY.format(statement), 2)] == found
    assert counts(BODY.format(statement), 3) == []  # no loop begins there


def test_a_loop_over_several_lines_and_one_inside_of_another() -> None:
    source = "for epoch in range(2):\n  n += 1\n  for x in (\n    loader\n  ):\n    k += 1\n"
    assert [counts(source, line) for line in (1, 3, 4)] == [[(2, "n += 1"), (6, "k += 1")], [(6, "k += 1")], [(6, "k += 1")]]
    assert counts("for x in", 1) == []


def counting(job: Job) -> dict[str, Any]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("elastic.worker.plain").addHandler(handler)
    net, seen = loops.model(), 0
    net, optimizer, loader = job.prepare(net, loops.adamw(net), loops.batch, steps=2, **loops.SIZES)
    for x, y in loader:
        seen += len(x)
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"told": told}


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
def test_one_worker_tells_the_user_where_the_first_loop_begins() -> None:
    def prepare(job: Job) -> None:
        job.profile = job.worker == 0

    agent = forks.run(2, train=counting, prepare=prepare)
    (said,) = agent.results[0]["told"]
    assert said.startswith(f"{__file__}: the body of the loop counts by itself (line ")
    assert ": seen += len(x))" in said
    assert agent.results[1]["told"] == []
