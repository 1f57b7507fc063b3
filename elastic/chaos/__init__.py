"""Fault injection: kills and slows workers of a running job, and records what was hit."""
