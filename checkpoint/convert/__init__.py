"""Checkpoints of others: read, and written."""
