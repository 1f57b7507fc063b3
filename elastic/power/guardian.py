"""The guardian: a small process that sets clocks for one agent, and restores them when the agent has ended, however that was.

It is in a session of its own, ignores what a terminal sends, and waits for requests over a socket whose other end the agent alone holds:
when that ends, it restores all clocks and exits. If it is killed itself, the agent starts another one, which first restores what was left;
if both are killed, the next guardian on this host does.
"""

from __future__ import annotations

import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from elastic.errors import PowerError
from elastic.host.channel import Channel
from elastic.host.process import continue_without_parent, name_process
from elastic.power.keeper import Keeper, restore_left
from elastic.power.nvml import Nvml
from elastic.power.records import Records
from elastic.power.session import answered


def main() -> None:
    """Runs a guardian; argv is the descriptor of the agent's socket, the directory of the records, and the job's name."""
    name_process("elastic-clocks")
    continue_without_parent()  # else a stopped guardian keeps the clocks of an agent that has ended
    descriptor, directory, job = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    agent = Channel.adopt(descriptor)
    signal.signal(signal.SIGTERM, lambda *_: _end(agent))
    try:
        restored, complaints = restore_left(directory)
        keeper = Keeper(Nvml(), Records(directory), job)
    except PowerError as error:
        agent.send({"type": "unusable", "condition": error.condition, "why": str(error)})
        return
    agent.send({"type": "ready", "restored": restored, "complaints": complaints})
    try:
        while not agent.closed:
            for request in agent.receive():
                agent.send(answered(keeper, request))
    finally:
        keeper.close()


def _end(agent: Channel) -> None:
    """Ends the connection, as the agent would: an exception here could interrupt the restoring."""
    with suppress(OSError):
        agent.sock.shutdown(socket.SHUT_RDWR)
