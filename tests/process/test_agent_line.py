"""Tests a worker's connection to its agent."""

from __future__ import annotations

import socket
import subprocess
import sys

from elastic.host.channel import Channel

PROGRAM = """
import sys, threading
from types import SimpleNamespace
from elastic.worker.main import _AgentLine

def deliver(message):
    raise OSError(12, "Cannot allocate memory")

_AgentLine(int(sys.argv[1])).listen(SimpleNamespace(deliver=deliver, epoch=3, step=7))
threading.Event().wait()
"""


def test_a_worker_that_cannot_take_a_message_in_says_why_and_ends() -> None:
    """It would wait for ever for what the message brings."""
    ours, theirs = socket.socketpair()
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(theirs.fileno())], pass_fds=[theirs.fileno()]) as worker:
        try:
            theirs.close()
            channel = Channel(ours)
            channel.send({"type": "view"})
            ours.settimeout(60)
            (said,) = channel.receive()
            assert (said["type"], said["kind"], said["epoch"], said["step"]) == ("error", "OSError", 3, 7)
            assert "Cannot allocate memory" in said["message"]
            assert worker.wait(30) == 1
        finally:
            worker.kill()
            ours.close()
