"""The entry point of the agent's process."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from pathlib import Path

from elastic.agent.agent import Agent
from elastic.agent.start import Start
from elastic.control.outcome import failed
from elastic.errors import JobFailed
from elastic.host.channel import Channel, Message
from elastic.host.process import continue_without_parent, default_children, end_session, name_process
from elastic.host.rundir import RunDirectory
from elastic.settings import job_mark

_OBJECTS = 100_000
_SWITCH_S = 5e-4


def main() -> None:
    """Runs an agent; argv is the descriptor of the launcher's socket."""
    name_process("elastic-agent")
    continue_without_parent()
    default_children()
    _seldom_collect()
    _switch_often()
    launcher = Channel.adopt(int(sys.argv[1]))
    messages: list[Message] = []
    while not messages and not launcher.closed:
        messages = launcher.receive()
    if not messages:
        return
    start = Start.from_json(messages[0])
    outcome, launcher_gone = _run(launcher, start)
    launcher.sock.setblocking(True)
    if outcome is not None:
        launcher.send(outcome)
    if launcher_gone:
        end_session(os.getpid(), "=".join(job_mark(start.directory)))  # processes that train_fn started; normally the launcher ends them
        directory = RunDirectory(Path(start.directory))
        directory.remove() if start.settings.directory is None else directory.clear()


def _seldom_collect() -> None:
    """Makes Python look for garbage in circles less often: to read the messages of a thousand workers makes hundreds of thousands of
    objects, which would be gone through again and again meanwhile, for nothing."""
    gc.freeze()
    gc.set_threshold(_OBJECTS, 50, 100)


def _switch_often() -> None:
    """Lets the event loop run soon while another thread computes: each of its system calls may cost it one such interval."""
    sys.setswitchinterval(_SWITCH_S)


def _run(launcher: Channel, start: Start) -> tuple[Message | None, bool]:
    try:
        agent = Agent(launcher, start)
        try:
            agent.run()
        finally:
            agent.close()
    except Exception:  # the process boundary: a bug here must not look like a lost process
        return failed(JobFailed, f"the agent failed:\n{traceback.format_exc()}"), launcher.closed
    return agent.outcome, agent.launcher_gone
