"""`elastic.current_job`: the job of this worker; or of a whole script that torchrun has started."""

from __future__ import annotations

import sys
from pathlib import Path

from elastic.errors import ElasticError
from elastic.launch.run import run
from elastic.settings import launched_rank
from elastic.worker import job as jobs
from elastic.worker.job import Job


def current_job() -> Job:
    """Returns the job that this process is a worker of: what `train_fn` gets.

    In a script that torchrun, or a launcher like it, has started, it does not return: the script runs as a whole in a worker for each rank
    of this host, and this process waits and ends with the job. If the job fails, local rank 0 prints why, and all exit with the error's
    `exit_code`, as `elastic run` does.

    Raises:
        NotInJob: in any other process.
    """
    found = launched_rank()
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if jobs.inside() or found is None or main is None:
        return jobs.current_job()
    try:
        run(str(Path(main).resolve()), workers=None if found.on_host > 1 else 1, args=sys.argv[1:])
    except ElasticError as error:
        if found.local == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    raise SystemExit(0)
