"""Tests that tensors of the CPU are sent by the rules of all ways; `tests/device` does the same on another device."""

from __future__ import annotations

import pytest
import torch

from tests.engine.tensor_link_rules import RULES, check

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("kind", ["unix", "tcp", "loopback"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules(rule, kind):
    check(rule, kind, torch.device("cpu"))
