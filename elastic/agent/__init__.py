"""The supervisor of one host: its event loop, the fork server, the worker processes."""
