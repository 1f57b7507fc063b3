"""Readers, writers and converters for checkpoints of other programs."""
