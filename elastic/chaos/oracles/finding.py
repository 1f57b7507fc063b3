"""What an oracle returns."""

from __future__ import annotations

from dataclasses import dataclass

PASS, FAIL, UNKNOWN = "pass", "fail", "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The judgement of one oracle: PASS, FAIL or UNKNOWN, with a sentence that says why."""

    oracle: str
    verdict: str
    reason: str


def passed(oracle: str, reason: str) -> Finding:
    return Finding(oracle=oracle, verdict=PASS, reason=reason)


def failed(oracle: str, reason: str) -> Finding:
    return Finding(oracle=oracle, verdict=FAIL, reason=reason)


def unknown(oracle: str, reason: str) -> Finding:
    return Finding(oracle=oracle, verdict=UNKNOWN, reason=reason)


def judged(oracle: str, wrong: list[str], reason: str) -> Finding:
    """FAIL with the first things that are wrong; else PASS with the reason."""
    if not wrong:
        return passed(oracle, reason)
    more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
    return failed(oracle, "; ".join(wrong[:3]) + more)
