"""Checkpoints that a person can open with plain safetensors, that no crash corrupts, and that resume on any layout."""
