"""Layouts: which worker holds which run of which layer; their coordinates, transfers and invariants. Values and pure functions."""
