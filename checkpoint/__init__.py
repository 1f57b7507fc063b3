"""Checkpoints that plain safetensors can open, that no crash corrupts, and that resume on any layout."""
