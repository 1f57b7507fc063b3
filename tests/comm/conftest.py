from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from comm_cluster import KINDS, Cluster


@pytest.fixture(params=KINDS)
def cluster(request: pytest.FixtureRequest) -> Iterator[Callable[..., Cluster]]:
    """Makes clusters of workers 0..n-1, linked to each other, of every implementation in turn."""
    made: list[Cluster] = []

    def make(size: int, installed: bool = True) -> Cluster:
        made.append(Cluster(request.param, range(size)))
        return made[-1].install(range(size)) if installed else made[-1]

    yield make
    for each in made:
        each.close()
