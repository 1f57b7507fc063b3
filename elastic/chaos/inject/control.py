"""Faults of agents and planned changes: an agent is killed, a host joins, a host is drained."""

from __future__ import annotations

import signal
import time

from elastic.chaos.inject.killing import ended_by_kill
from elastic.chaos.scene import Effect, Hit, NoEffect, Scene, Vanished

_JOIN_S, _LEAVE_S = 180.0, 120.0
_LEFT = (0, 143)  # the job was done, or the agent was told to end


def agent_kill(scene: Scene, effect: Effect) -> None:
    """Kills the agent of one host; its workers die with it, and its launcher (or the scheduler) starts another one."""
    host = scene.host(effect.injection.host)
    agent = host.agent
    if agent is None:
        raise Vanished("the agent ended by itself just before")
    scene.losing(effect, host)
    for target in host.targets():
        scene.hit(effect, target)
    effect.hits.append(Hit(pid=agent, host=host.number))
    effect.at = time.monotonic()
    ended_by_kill(agent)
    effect.proof = f"the agent of host {host.number} (process {agent}) ended by SIGKILL"


def join(scene: Scene, effect: Effect) -> None:
    """Starts another host, and waits until its workers are members."""
    effect.at = time.monotonic()
    host = scene.job.add()
    effect.hits.append(Hit(host=host.number))
    scene.wait(f"workers of host {host.number} are members", lambda: host.targets() or host.expected, _JOIN_S)
    if host.expected:
        raise NoEffect(f"host {host.number} ended with exit code {host.codes[-1]} before it had joined")
    effect.proof = f"workers {', '.join(str(each.worker) for each in host.targets())} of host {host.number} joined"


def drain(scene: Scene, effect: Effect) -> None:
    """Drains a host, and starts a new one when it has left."""
    host = scene.host(effect.injection.host, least=2)  # to drain the only host is to stop the job
    for target in host.targets():
        scene.hit(effect, target)
    effect.at = time.monotonic()
    host.expected = True  # it is not started again
    if not host.alive:
        host.expected = False
        raise Vanished(f"host {host.number} ended by itself just before")
    host.process.send_signal(signal.SIGTERM)
    scene.wait(f"host {host.number} has left", lambda: not host.alive, _LEAVE_S)
    host.codes.append(host.process.returncode)
    if not scene.over.wait(effect.injection.lasts_s):
        scene.job.add()
    if host.codes[-1] not in _LEFT:
        raise NoEffect(f"host {host.number} ended with exit code {host.codes[-1]} when it was to leave")
    effect.proof = f"host {host.number} left with exit code {host.codes[-1]}"
