"""Faults of agents and planned changes: an agent is killed, a host joins, a host is drained."""

from __future__ import annotations

import signal
import time

from elastic.chaos.hosts import send, stat_of
from elastic.chaos.scene import Effect, Hit, NoEffect, Scene

_DEATH_S, _JOIN_S, _LEAVE_S = 5.0, 90.0, 90.0


def agent_kill(scene: Scene, effect: Effect) -> None:
    """Kills the agent of one host; its workers die with it, and its launcher (or the scheduler) starts another one."""
    host = scene.host(effect.injection.host)
    agent = host.agent
    if agent is None:
        raise NoEffect("the agent ended by itself just before")
    scene.losing(effect, host)
    for target in host.targets():
        scene.hit(effect, target)
    effect.hits.append(Hit(pid=agent, host=host.number))
    effect.at = time.monotonic()
    send(agent, signal.SIGKILL)
    scene.wait("the agent is dead", lambda: stat_of(agent) is None, _DEATH_S)
    effect.proof = f"the agent of host {host.number} (process {agent}) ended by SIGKILL"


def join(scene: Scene, effect: Effect) -> None:
    """Starts another host, and waits until its workers are members."""
    effect.at = time.monotonic()
    host = scene.job.add()
    effect.hits.append(Hit(host=host.number))
    scene.wait(f"workers of host {host.number} are members", host.targets, _JOIN_S)
    effect.proof = f"workers {', '.join(str(each.worker) for each in host.targets())} of host {host.number} joined"


def drain(scene: Scene, effect: Effect) -> None:
    """Drains a host, and starts a new one when it has left."""
    host = scene.host(effect.injection.host)
    if len(scene.job.present) < 2:
        raise NoEffect("only one host takes part: to drain it is to stop the job")
    for target in host.targets():
        scene.hit(effect, target)
    effect.at = time.monotonic()
    host.expected = True
    host.process.send_signal(signal.SIGTERM)
    scene.wait(f"host {host.number} has left", lambda: not host.alive, _LEAVE_S)
    host.codes.append(host.process.returncode)
    effect.proof = f"host {host.number} left with exit code {host.codes[-1]}"
    if not scene.over.wait(effect.injection.lasts_s):
        scene.job.add()
