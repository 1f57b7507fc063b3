"""Hosts in network namespaces, for tests; they are skipped where namespaces are not permitted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from elastic.chaos.namespaces import Network, etcd_at

__all__ = ["Network", "etcd_at", "network"]


@contextmanager
def network(hosts: int) -> Iterator[Network]:
    """A network of so many hosts; skips the test where that is not permitted."""
    made = Network(f"e{os.getpid() % 100000}h", hosts, f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}")
    try:
        made.make()
    except (OSError, subprocess.CalledProcessError) as error:
        made.remove()
        pytest.skip(f"network namespaces are not permitted here: {error}")
    try:
        yield made
    finally:
        made.remove()
