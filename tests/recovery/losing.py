"""A train function whose workers lose hosts of theirs at given moments."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from elastic.host.rundir import RunDirectory
from tests.recovery import outliving, simulated_hosts


def train(job: Any, folder: str, case: str, steps: int, fates: dict[str, list[Any]], lost: list[int]) -> Any:
    """`fates` are those of `outliving.train`; whenever several workers die at once, hosts `lost` are lost with what they have in memory."""
    job.host, job.interface = simulated_hosts.name_of(job.worker), "127.0.0.1"
    end = outliving.end

    def ended(job: Any, victims: list[int] | None) -> None:
        if victims is not None and len(victims) > 1:
            lose(job)
        end(job, victims)

    def lose(job: Any) -> None:
        members = json.loads(RunDirectory(Path(job.directory)).members.read_text())["members"]
        newest = max([job.worker, *(member["worker"] for member in members)])
        with Path(os.environ[simulated_hosts.LOST]).open("a") as file:
            file.writelines(f"{host} {newest + 1}\n" for host in lost)

    outliving.end = ended
    return outliving.train(job, folder, case, steps, fates)
