"""Copies of training state in memory: what a worker owns and the step before it, and what it keeps for others."""
