"""Faults of the network between hosts."""

from __future__ import annotations

import subprocess
import time

from elastic.chaos.hosts import Host, stat_of
from elastic.chaos.namespaces import Network
from elastic.chaos.proxies import Proxies
from elastic.chaos.scene import Effect, Hit, NoEffect, Scene

_BEFORE_S, _TRIES, _END_S = 5.0, 3, 5.0


def _network(scene: Scene) -> Network | Proxies:
    if scene.job.network is None:
        raise NoEffect("the job has one host")
    return scene.job.network


def _reached_s(scene: Scene, host: Host, limit_s: float = 1.0) -> float | None:
    """The seconds in which a host reaches the harness's etcd, None if it does not."""
    port = 0 if scene.job.etcd is None else scene.job.etcd.port
    return _network(scene).reached_s(host.number, port, limit_s)


def _reaching(scene: Scene, effect: Effect) -> Host:
    """The host to be hit, which reaches others: else nothing would show that it does so no longer. Raises NoEffect."""
    host = scene.host(effect.injection.host)
    if _reached_s(scene, host, _BEFORE_S) is None:
        raise NoEffect(f"host {host.number} did not reach others before the fault")
    return host


def _cut(scene: Scene, effect: Effect, host: Host) -> None:
    scene.losing(effect, host)
    for target in host.targets():
        scene.hit(effect, target)
    effect.hits.append(Hit(host=host.number))
    effect.at = time.monotonic()
    host.cut = True
    _network(scene).cut(host.number)


def partition(scene: Scene, effect: Effect) -> None:
    """Cuts a host's cable, and heals it later."""
    host, network = _reaching(scene, effect), _network(scene)
    _cut(scene, effect, host)
    try:
        if _reached_s(scene, host) is None:
            effect.proof = f"host {host.number} reached nobody, and had just before"
        scene.last(max(0.0, (effect.at or 0.0) + effect.injection.lasts_s - time.monotonic()))
    finally:
        network.heal(host.number)
        host.cut = False
    if effect.proof is None:
        raise NoEffect(f"host {host.number} still reached others")


def host_loss(scene: Scene, effect: Effect) -> None:
    """Cuts a host's cable and its power; a new host takes its place later."""
    host = scene.host(effect.injection.host)
    _cut(scene, effect, host)
    host.expected = True
    pids = [pid for pid in (host.process.pid, host.agent, *host.joiners(), *(hit.pid for hit in effect.hits)) if pid is not None]
    host.kill()
    scene.last_until(lambda: all(stat_of(pid) is None for pid in pids), _END_S)
    alive = [pid for pid in pids if stat_of(pid) is not None]
    if not alive:
        effect.proof = f"all {len(pids)} processes of host {host.number} ended, behind a cut cable"
    if not scene.over.wait(effect.injection.lasts_s):
        scene.job.add()
    if alive:
        raise NoEffect(f"processes {', '.join(map(str, alive))} of host {host.number} still lived {_END_S:g} s after its end")


def delay(scene: Scene, effect: Effect) -> None:
    """Makes what a host sends arrive late for a while."""
    host, network = _reaching(scene, effect), _network(scene)
    effect.hits.append(Hit(host=host.number))
    effect.at = time.monotonic()
    try:
        network.delay(host.number, effect.injection.strength)
        late_s = effect.injection.strength / 1000
        seconds = min(_reached_s(scene, host, late_s + 1.0) or late_s + 1.0 for _ in range(_TRIES if late_s < 1.0 else 1))
        if seconds >= late_s:
            effect.proof = f"an answer to host {host.number} took {1000 * seconds:.1f} ms"
        scene.last(effect.injection.lasts_s)
        network.delay(host.number, 0.0)
    except subprocess.CalledProcessError as error:
        raise NoEffect(f"netem cannot delay: {error.stderr.decode().strip()}") from None
    if effect.proof is None:
        raise NoEffect(f"an answer to host {host.number} took only {1000 * seconds:.1f} ms")
