"""The `elastic` command."""
