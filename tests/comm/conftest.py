from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from comm_cluster import KINDS, Cluster, clusters


@pytest.fixture(params=KINDS)
def cluster(request: pytest.FixtureRequest) -> Iterator[Callable[..., Cluster]]:
    """Makes clusters of workers 0..n-1, linked to each other, of every implementation in turn."""
    yield from clusters(request.param)
