"""Faults of the network between hosts."""

from __future__ import annotations

import subprocess
import time

from elastic.chaos.hosts import Host
from elastic.chaos.namespaces import Network
from elastic.chaos.proxies import Proxies
from elastic.chaos.scene import Effect, Hit, NoEffect, Scene


def _network(scene: Scene) -> Network | Proxies:
    if scene.job.network is None:
        raise NoEffect("the job has one host")
    return scene.job.network


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
    host, network = scene.host(effect.injection.host), _network(scene)
    _cut(scene, effect, host)
    try:
        if isinstance(network, Network):
            reached = subprocess.run(
                [*network.command(host.number), "ping", "-c", "1", "-W", "1", network.gateway], check=False, capture_output=True
            )
            effect.proof = "the gateway did not answer the host" if reached.returncode else None
        else:
            effect.proof = "the host's proxy passes nothing on"
        scene.last(max(0.0, (effect.at or 0.0) + effect.injection.lasts_s - time.monotonic()))
    finally:
        network.heal(host.number)
        host.cut = False
    if effect.proof is None:
        raise NoEffect("the gateway still answered the host")


def host_loss(scene: Scene, effect: Effect) -> None:
    """Cuts a host's cable and its power; a new host takes its place later."""
    host = scene.host(effect.injection.host)
    _cut(scene, effect, host)
    host.expected = True
    host.kill()
    effect.proof = f"all processes of host {host.number} ended by SIGKILL, behind a cut cable"
    if not scene.over.wait(effect.injection.lasts_s):
        scene.job.add()


def delay(scene: Scene, effect: Effect) -> None:
    """Makes what a host sends arrive late for a while."""
    host, network = scene.host(effect.injection.host), _network(scene)
    effect.hits.append(Hit(host=host.number))
    effect.at = time.monotonic()
    try:
        network.delay(host.number, effect.injection.strength)
        if isinstance(network, Network):
            seconds = _ping_s(network, host)
            effect.proof = f"a ping took {1000 * seconds:.1f} ms" if seconds >= effect.injection.strength / 1000 else None
        else:
            effect.proof = "the host's proxy passes everything on late"
        scene.last(effect.injection.lasts_s)
        network.delay(host.number, 0.0)
    except subprocess.CalledProcessError as error:
        raise NoEffect(f"netem cannot delay: {error.stderr.decode().strip()}") from None
    if effect.proof is None:
        raise NoEffect("a ping took no longer than without it")


def _ping_s(network: Network, host: Host) -> float:
    command = [*network.command(host.number), "ping", "-c", "1", "-W", "2", network.gateway]
    began = time.monotonic()
    subprocess.run(command, check=False, capture_output=True)
    return time.monotonic() - began
