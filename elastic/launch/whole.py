"""`elastic.current_job`: the job of this worker; or of a whole script that torchrun has started."""

from __future__ import annotations

import sys
from pathlib import Path

from elastic.launch.run import run
from elastic.settings import launched_rank
from elastic.worker import job as jobs
from elastic.worker.job import Job


def current_job() -> Job:
    """Returns the job that this process is a worker of: what `train_fn` gets.

    In a script that torchrun, or a launcher like it, has started, it does not return: the script runs as a whole in a worker for each rank
    of this host, and this process waits and ends with the job.

    Raises:
        NotInJob: in any other process.
        ElasticError: what `run` raises.
    """
    found = launched_rank()
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if jobs.inside() or found is None or main is None:
        return jobs.current_job()
    run(str(Path(main).resolve()), workers=None if found.on_host > 1 else 1, args=sys.argv[1:])
    raise SystemExit(0)
