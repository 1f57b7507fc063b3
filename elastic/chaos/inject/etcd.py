"""Faults of etcd: the job's private one, or the harness's own."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from elastic.chaos.hosts import children_of, stat_of
from elastic.chaos.inject.killing import ended_by_kill
from elastic.chaos.own_etcd import OwnEtcd
from elastic.chaos.scene import Effect, Hit, NoEffect, Scene

_AGAIN_S = 120.0


def restart(scene: Scene, effect: Effect) -> None:
    """Kills etcd; it is started again at once."""
    with scene.turn("etcd"):
        if scene.job.etcd is not None:
            _down(scene, effect, scene.job.etcd, 0.0)
        else:
            _restart_private(scene, effect)


def _restart_private(scene: Scene, effect: Effect) -> None:
    pid = scene.wait("the job's private etcd runs", lambda: _private(scene))
    effect.hits.append(Hit(pid=pid))
    ended_by_kill(pid)
    effect.at = time.monotonic()
    new = scene.wait("the job starts its etcd again", lambda: (found := _private(scene)) != pid and found, _AGAIN_S)
    effect.proof = f"etcd's process {pid} ended by SIGKILL, and {new} took its place"


def _private(scene: Scene) -> int | None:
    """The process of the private etcd, a child of the agent; the job may get another agent meanwhile."""
    agents = [agent for host in scene.job.present if (agent := host.agent) is not None]
    for pid in (pid for agent in agents for pid in children_of(agent)):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "etcd" and stat_of(pid) is not None:
                return pid
    return None


def down(scene: Scene, effect: Effect) -> None:
    """Kills etcd, and starts it again later."""
    with scene.turn("etcd"):
        _down(scene, effect, _own(scene), effect.injection.lasts_s)


def _down(scene: Scene, effect: Effect, etcd: OwnEtcd, seconds: float) -> None:
    pid = etcd.pid
    if pid is None:
        raise NoEffect("etcd had ended by itself")
    effect.hits.append(Hit(pid=pid))
    effect.at = time.monotonic()
    etcd.kill()
    answers = etcd.serves()
    scene.last(seconds)
    etcd.start()
    if answers:
        raise NoEffect("etcd answered after its process was killed")
    effect.proof = (
        f"etcd's process {pid} ended by SIGKILL, did not answer, and was started again after {time.monotonic() - effect.at:.1f} s"
    )


def full(scene: Scene, effect: Effect) -> None:
    """Makes etcd refuse writes, as one without space does."""
    with scene.turn("etcd"):
        _full(scene, effect, _own(scene))


def _full(scene: Scene, effect: Effect, etcd: OwnEtcd) -> None:
    effect.at = time.monotonic()
    try:
        etcd.alarm(full=True)
        refused = not etcd.writes() and etcd.serves()
        scene.last(effect.injection.lasts_s)
        etcd.alarm(full=False)
    except OSError as error:
        raise NoEffect(f"etcd did not take the alarm: {error}") from None
    if not refused:
        raise NoEffect("etcd still took writes")
    effect.proof = "etcd refused a write, and served a read"


def _own(scene: Scene) -> OwnEtcd:
    if scene.job.etcd is None:
        raise NoEffect("the job has a private etcd")
    return scene.job.etcd
