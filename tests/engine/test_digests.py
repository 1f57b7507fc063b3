"""Tests the digest of all parameters: its bits, and its number of rounds."""

from __future__ import annotations

import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from elastic.comm import LoopbackHub, LoopbackNetwork, Rounds
from elastic.engine import digests


@given(st.lists(st.integers(0, 100)), st.integers(1, 200))
def test_batches_keep_the_order_and_are_as_large_as_they_may_be(sizes, most):
    named = {str(number): size for number, size in enumerate(sizes)}
    found = list(digests.batches(named, most))
    assert list(itertools.chain(*found)) == list(named)
    totals = [sum(named[name] for name in batch) for batch in found]
    assert all(total <= most or len(batch) == 1 for total, batch in zip(totals, found, strict=True))
    assert all(total + named[after[0]] > most for total, after in zip(totals, found[1:], strict=False))


def test_thousands_of_parameters_take_few_rounds_and_the_digest_is_that_of_their_bytes():
    workers = (3, 4, 7)
    generator = np.random.default_rng(0)
    values = {f"layer.{i:04}": generator.integers(0, 256, 1 + i % 900, dtype=np.uint8) for i in range(3000)}
    values["m.large"] = generator.integers(0, 256, digests.ROUND_BYTES + 5, dtype=np.uint8)
    values["z.empty"] = np.zeros(0, np.uint8)
    holders = {name: workers[i % 3] for i, name in enumerate(values)}
    sizes = {name: value.nbytes for name, value in values.items()}
    hub = LoopbackHub()
    networks = {worker: LoopbackNetwork(worker, hub) for worker in workers}
    members = [SimpleNamespace(worker=worker, host="host", address="") for worker in workers]

    def one(worker: int) -> str:
        networks[worker].install(1, 0, members, workers)
        mine = {name: value for name, value in values.items() if holders[name] == worker}
        rounds = Rounds(networks[worker], worker, workers, 3)
        return digests.digest(rounds, itertools.count().__next__, worker, sizes, holders, mine.__getitem__)

    with ThreadPoolExecutor(len(workers)) as threads:
        found = set(threads.map(one, workers))
    assert found == {hashlib.sha256(b"".join(value.tobytes() for value in values.values())).hexdigest()}
    assert networks[7].stats.messages < 10
    for network in networks.values():
        network.close()
