"""Oracles: pure functions of the evidence of a run. Each returns pass, fail or unknown, with the reason."""

from __future__ import annotations

from collections.abc import Callable

from elastic.chaos.evidence import Evidence
from elastic.chaos.oracles import ending, history, numbers
from elastic.chaos.oracles.finding import FAIL, PASS, UNKNOWN, Finding

__all__ = ["ALL", "FAIL", "PASS", "UNKNOWN", "Finding", "judge", "verdict_of"]

ALL: tuple[Callable[[Evidence], Finding], ...] = (
    ending.took_effect,
    ending.ended,
    numbers.losses,
    numbers.digest,
    numbers.handed_once,
    numbers.samples,
    numbers.agreement,
    history.one_history,
    history.promises,
    history.accounts,
    history.blame,
    ending.left_behind,
    ending.resources,
    ending.stalls,
)


def judge(evidence: Evidence) -> tuple[Finding, ...]:
    """Returns the findings of all oracles."""
    return tuple(oracle(evidence) for oracle in ALL)


def verdict_of(findings: tuple[Finding, ...]) -> str:
    """FAIL if any oracle fails; else UNKNOWN if any does not know; else PASS."""
    verdicts = {finding.verdict for finding in findings}
    return FAIL if FAIL in verdicts else UNKNOWN if UNKNOWN in verdicts else PASS
