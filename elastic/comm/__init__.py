"""Links among workers, edited in place when the membership changes, and rounds of agreement over them."""

from elastic.comm.endpoint import Endpoint, MemberLike, Stats
from elastic.comm.loopback import LoopbackHub, LoopbackNetwork
from elastic.comm.message import MessageKind, Tag
from elastic.comm.network import Network
from elastic.comm.rounds import Payload, Rounds

__all__ = [
    "Endpoint",
    "LoopbackHub",
    "LoopbackNetwork",
    "MemberLike",
    "MessageKind",
    "Network",
    "Payload",
    "Rounds",
    "Stats",
    "Tag",
]
