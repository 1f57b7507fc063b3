"""This machine: processes, signals, limits, channels between processes, the run directory."""
