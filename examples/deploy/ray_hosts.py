"""One job on several nodes of a Ray cluster: one actor a node, which runs `elastic agent` with the node's workers.

    ray job submit --working-dir . -- python ray_hosts.py train.py:train --etcd etcd.example:2379 --nodes 4 --workers 4

Ray places the actors, and starts one again that was lost with its node; it joins the job. The workers are the agent's, not Ray's, so a
dead worker is replaced within the job, and Ray does not notice.
"""

from __future__ import annotations

import argparse
import secrets
import subprocess
import sys
import tempfile
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray.util.placement_group import placement_group  # pyright: ignore[reportMissingImports]
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # pyright: ignore[reportMissingImports]

AGAIN = 75
"""The exit code of an agent that should be started again."""


class Host:
    """One node's part in the job."""

    def __init__(self, options: list[str], secret: str) -> None:
        self._options, self._secret = options, secret

    def train(self) -> int:
        """Runs the agent until the job has ended, and returns its exit code."""
        with tempfile.NamedTemporaryFile("w") as file:  # readable by this user alone
            file.write(self._secret)
            file.flush()
            command = [sys.executable, "-m", "elastic.cli.main", "agent", "--secret-file", file.name, *self._options]
            while (code := subprocess.run(command, check=False).returncode) == AGAIN:
                pass
            return code


def train(target: str, etcd: str, job: str, nodes: int, workers: int, strategy: str) -> list[int]:
    """Runs the job on so many nodes. Returns the exit codes of its agents."""
    group = placement_group([{"CPU": workers}] * nodes, strategy=strategy)
    ray.get(group.ready())
    options = ["--etcd", etcd, "--job", job, "--workers", str(workers), "--hosts-min", str(nodes), target]
    place: Any = PlacementGroupSchedulingStrategy(placement_group=group)
    remote = ray.remote(num_cpus=workers, max_restarts=-1, max_task_retries=-1, scheduling_strategy=place)(Host)
    secret = secrets.token_hex(32)
    hosts = [remote.remote(options, secret) for _ in range(nodes)]
    return ray.get([each.train.remote() for each in hosts])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="path.py:function or module:function")
    parser.add_argument("--etcd", required=True, help="host:port of an etcd that all nodes reach")
    parser.add_argument("--job", default="gpt")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4, help="of each node")
    parser.add_argument("--strategy", default="STRICT_SPREAD", help="Ray's: PACK allows several hosts on one node")
    given = parser.parse_args()
    ray.init()
    codes = train(given.target, given.etcd, given.job, given.nodes, given.workers, given.strategy)
    ray.shutdown()
    print(f"exit codes of the hosts: {codes}")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
