"""What TLS costs a link between hosts: the same messages over TCP on loopback, in the clear and encrypted, by two networks of this process.

CPU time is that of both ends together, which other work on the machine hardly changes. Wall-clock time is the least of all rounds. Rounds
of both kinds alternate.

    python benchmarks/tls.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elastic.comm import MessageKind, Network, Tag
from elastic.comm.job_certificate import job_credentials
from elastic.comm.tls import Tls

_SECRET = b"the secret of a benchmark"
_SIZES = (4 << 10, 64 << 10, 1 << 20, 64 << 20)
_ROUND_BYTES, _ROUNDS = 128 << 20, 5
_MESSAGES = 2000  # at most, in a round
_LINKS = 20


@dataclass(frozen=True)
class Peer:
    """A worker and its address."""

    worker: int
    host: str
    address: str


@contextmanager
def linked(*, encrypted: bool) -> Iterator[tuple[Network, Network]]:
    """Two workers of different hosts with a link."""
    credentials = job_credentials(_SECRET)
    made = [
        Network(worker, secret=_SECRET, host=f"host-{worker}", interface="127.0.0.1", tls=Tls(credentials) if encrypted else None)
        for worker in (0, 1)
    ]
    try:
        _install(made, 1)
        yield made[0], made[1]
    finally:
        for network in made:
            network.close()


def _install(networks: list[Network], epoch: int) -> None:
    peers = [Peer(network.worker, f"host-{network.worker}", network.address) for network in networks]
    other = threading.Thread(target=lambda: networks[0].install(epoch, 0, peers, [1]))
    other.start()
    networks[1].install(epoch, 0, peers, [0])
    other.join()


def exchanged(ends: tuple[Network, Network], size: int, first: int) -> tuple[float, float]:
    """Returns CPU and wall-clock seconds of one message of `size` bytes, sent by one thread and received by another."""
    count = max(2, min(_MESSAGES, _ROUND_BYTES // size))
    data, place = np.ones(size, np.uint8), np.empty(size, np.uint8)

    def receive() -> None:
        for number in range(first, first + count):
            ends[1].post(0, Tag(MessageKind.PARAMETER, number), place)
            ends[1].receive(0, Tag(MessageKind.PARAMETER, number))

    receiving = threading.Thread(target=receive)
    used, began = time.process_time(), time.perf_counter()
    receiving.start()
    for number in range(first, first + count):
        ends[0].send(1, Tag(MessageKind.PARAMETER, number), data)
    receiving.join()
    return (time.process_time() - used) / count, (time.perf_counter() - began) / count


def linking(*, encrypted: bool) -> float:
    """Returns the CPU seconds of making a link, both ends together."""
    with linked(encrypted=encrypted) as ends:
        used = time.process_time()
        for epoch in range(2, 2 + _LINKS):
            ends[1].drop(0)
            while ends[0].stats.links:
                time.sleep(0)
            _install(list(ends), epoch)
        return (time.process_time() - used) / _LINKS


def measured() -> dict[str, dict[str, float]]:
    """Returns, by what was measured, milliseconds in the clear and encrypted, and the ratio."""
    found: dict[str, dict[str, float]] = {}
    with linked(encrypted=False) as plain, linked(encrypted=True) as encrypted:
        for size in _SIZES:
            rounds = [(exchanged(plain, size, r * _MESSAGES), exchanged(encrypted, size, r * _MESSAGES)) for r in range(_ROUNDS)]
            for place, what, best in ((0, "CPU", statistics.median), (1, "wall", min)):
                name = f"{what} ms of a message of {size >> 10} KiB"
                found[name] = _compared(best, [each[0][place] for each in rounds], [each[1][place] for each in rounds])
    rounds = [(linking(encrypted=False), linking(encrypted=True)) for _ in range(_ROUNDS)]
    found["CPU ms of making a link"] = _compared(statistics.median, [each[0] for each in rounds], [each[1] for each in rounds])
    return found


def _compared(best: Callable[[list[float]], float], plain: list[float], encrypted: list[float]) -> dict[str, float]:
    clear, tls = best(plain), best(encrypted)
    return {"plain": round(1e3 * clear, 4), "tls": round(1e3 * tls, 4), "ratio": round(tls / clear, 2)}


def main() -> None:
    """Prints a table, and writes JSON if that is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measured()
    for name, values in found.items():
        print(f"{name:36}  plain {values['plain']:10.4f}   tls {values['tls']:10.4f}   x {values['ratio']:.2f}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
