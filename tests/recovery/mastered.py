"""`outliving.train` with the cases that have float32 masters."""

from __future__ import annotations

from typing import Any

from tests.engine import mastered
from tests.recovery import outliving


def case(name: str) -> dict[str, Any]:
    """Returns a case as `outliving` has them, with float32 data."""
    found = {"loss": mastered.mean, "optimizer": mastered.models.adamw, "master_weights": True, **mastered.CASES[name]}
    dtype, build = found.pop("dtype", mastered.torch.bfloat16), found["model"]
    return {**found, "model": lambda: [mastered.Cast(dtype), *build()]}


outliving.CASES |= {name: case(name) for name in mastered.CASES}
train = outliving.train


def resumes(_: Any, saved: str, steps: int, masters: bool) -> dict[str, Any]:
    """Goes on from a checkpoint, with or without masters; says what the masters are, and in which dtype Adam's states are."""
    made = mastered.trainer("bfloat16", checkpoint=saved, master_weights=masters)
    seen = [[report.step, report.loss] for report in made.run(steps)]
    dtypes = {str(each.dtype) for name, each in made.state_dict("exp_avg").items()}
    return {"seen": seen, "digest": made.digest(), "dtypes": sorted(dtypes), **(mastered.masters(made) if masters else {})}
