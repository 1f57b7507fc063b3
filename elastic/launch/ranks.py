"""A launcher that starts one process a rank, such as torchrun: whether `elastic.run` can do its part in such a process."""

from __future__ import annotations

from elastic.errors import SettingsError
from elastic.settings import launched_rank


def check(*, shared: bool) -> None:
    """Refuses ranks that would each run the whole job. `shared`: hosts run this job together. Raises SettingsError."""
    found = launched_rank()
    if found is None:
        return
    if found.on_host > 1:
        raise SettingsError(
            f"this program is rank {found.rank} of {found.world}, {found.on_host} of them on this host, and elastic.run starts the workers "
            f"itself: each rank would run a whole job. Start one process a host: `torchrun --nproc-per-node=1 ...` with "
            f"elastic.run(..., workers={found.on_host}), or `python` instead of torchrun"
        )
    if found.world > 1 and not shared:
        raise SettingsError(
            f"this program is rank {found.rank} of {found.world}, on as many hosts, and each would train by itself: give elastic.run "
            "etcd=, name= and secret=, so that they train together, or start `elastic agent` on each host"
        )
