"""Names the layer whose operation has no deterministic implementation on the device. On the CPU there is no such check by default."""

from __future__ import annotations

import re

import torch

from elastic.errors import TrainerError
from elastic.memory import device

_SAYS = re.compile(r"^(?P<operation>.+?) does not have a deterministic implementation", re.DOTALL)


def relax() -> None:
    """Lets such operations run, each with one warning: for `exact=False`."""
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(True, warn_only=True)


def refuse(error: RuntimeError, where: str) -> None:
    """Raises TrainerError if torch raised this error in `where` for that reason."""
    found = _SAYS.match(str(error))
    if found is None:
        return
    raise TrainerError(
        f"{where} uses {found['operation']}, which has no deterministic implementation on {device.current().type}: the same step would "
        "have other bits each time. Use another operation. With Trainer(exact=False) training goes on with this one, and a step that is "
        "computed again after a loss may differ in its last bits"
    ) from error
