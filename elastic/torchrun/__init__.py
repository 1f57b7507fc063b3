"""`torchrun --rdzv-backend=etcd-v3`: torch's own rendezvous, with its state in an etcd that speaks version 3 of the protocol.

torch has backends for version 2 only, which etcd has removed. This package adds the two things that torch asks for, a backend and a store;
who is in which round, with which rank, is decided by torch's `DynamicRendezvousHandler`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def etcd_v3() -> Callable[[Any], Any]:
    """Returns what torch calls to make a handler. torch loads this entry point whenever it is imported, so it imports nothing."""
    return _handler


def _handler(params: Any) -> Any:
    from elastic.torchrun.rendezvous import create

    return create(params)
