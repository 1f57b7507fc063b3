"""Elastic training that keeps taking exactly the same steps while machines come and go.

`run` starts a job from any script; a `Trainer` takes the steps inside its workers. Names are loaded on first use: so `import elastic` does
not import torch, and small processes such as the guardian of GPU clocks start fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from elastic import errors
from elastic.settings import VERSION

if TYPE_CHECKING:
    from elastic.engine.cutting.layers import layers
    from elastic.engine.losses import token_loss
    from elastic.launch.callbacks import Callback
    from elastic.launch.run import JobResult, run
    from elastic.launch.whole import current_job
    from elastic.worker.job import Job
    from elastic.worker.trainer import Report, Trainer

__version__ = VERSION
__all__ = ["Callback", "Job", "JobResult", "Report", "Trainer", "__version__", "current_job", "errors", "layers", "run", "token_loss"]

_LAZY = {
    "Callback": "elastic.launch.callbacks",
    "Job": "elastic.worker.job",
    "JobResult": "elastic.launch.run",
    "Report": "elastic.worker.report",
    "Trainer": "elastic.worker.trainer",
    "current_job": "elastic.launch.whole",
    "layers": "elastic.engine.cutting.layers",
    "run": "elastic.launch.run",
    "token_loss": "elastic.engine.losses",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'elastic' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
