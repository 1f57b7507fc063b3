"""Gives a worker its device: which one it is, and the settings that must be in place before anything is computed on it."""

from __future__ import annotations

import torch

from elastic import settings
from elastic.errors import SettingsError
from elastic.memory import device


def choose(kind: str, slot: int, per_device: int) -> str:
    """Returns the kind of device that this worker computes on. A GPU is made the only one that its process sees.

    It is called before the user's code runs, since CUDA reads its variable once. No context is made.

    Raises:
        SettingsError: if CUDA_VISIBLE_DEVICES names fewer GPUs than this worker needs.
    """
    if kind not in ("auto", "cuda") or (kind == "auto" and not _cuda_works()):
        return "cpu" if kind == "auto" else kind
    place, visible = slot // per_device, settings.visible_gpus()
    if visible is not None and place >= len(visible):
        raise _too_few("cuda", place, len(visible), per_device)
    settings.see_only(visible[place] if visible is not None else str(place))
    return "cuda"


def _cuda_works() -> bool:
    return torch.version.cuda is not None and torch.cuda.device_count() > 0  # by NVML: makes no context


def begin(kind: str, slot: int, per_device: int) -> str:
    """Makes this worker's device the one that layers compute on, and returns its name.

    Raises:
        SettingsError: if torch does not know the kind here, or this host has too few of them.
    """
    if kind == "cpu":
        return kind
    found = _device(kind, slot, per_device)
    _compute_deterministically()
    try:
        device.use(found, per_device)
    except RuntimeError as error:
        raise SettingsError(f"{found} cannot be used on this host: {error}") from error
    return str(found)


def _device(kind: str, slot: int, per_device: int) -> torch.device:
    try:
        count = torch.get_device_module(kind).device_count()
    except (RuntimeError, AttributeError) as error:
        raise SettingsError(
            f"device={kind!r}: torch {torch.__version__} knows no such device on this host. Import the package that adds it in the module "
            "of train_fn, or use another device="
        ) from error
    place = 0 if kind == "cuda" else slot // per_device  # a worker sees only its own GPU
    if place >= count:
        raise _too_few(kind, slot // per_device, count if kind != "cuda" else slot // per_device, per_device)
    return torch.device(kind, place)


def _too_few(kind: str, place: int, count: int, per_device: int) -> SettingsError:
    if count == 0 or (kind == "cuda" and torch.version.cuda is None):
        why = " (it was built without CUDA)" if kind == "cuda" and torch.version.cuda is None else ""
        return SettingsError(
            f"device={kind!r}: torch {torch.__version__}{why} can use no such device on this host: install its driver and a torch that was "
            "built for it (and see what CUDA_VISIBLE_DEVICES names, if it is set), or train with device='cpu' or 'auto'"
        )
    return SettingsError(
        f"a worker needs {kind}:{place}, but this host has {count} of these devices, for {per_device} worker{'s'[: per_device > 1]} each: "
        f"lower workers= (and spares=) to {count * per_device}, or set workers_per_device="
    )


def _compute_deterministically() -> None:
    """Makes torch use only operations whose results are the same each time, and no kernel that it would choose by measuring."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def describe() -> dict[str, str]:
    """Returns what bits depend on in this worker's device: its kind, and for a GPU its name, processors, driver and libraries."""
    own = device.current()
    if own.type != "cuda":
        return {} if own.type == "cpu" else {"device": own.type}
    properties = torch.cuda.get_device_properties(own)
    return {
        "device": f"{properties.name}, {properties.multi_processor_count} processors, capability {properties.major}.{properties.minor}",
        "cuda": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
    }
