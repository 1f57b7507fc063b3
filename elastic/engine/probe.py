"""Finds out how an optimizer behaves by running it on sample tensors like the model's, with each group's settings.

The probe takes a few steps over all samples together, over subsets (also the empty one) as owners would, and over pieces of the samples. It
compares tensors, state and group settings bit by bit. Gradients of successive steps have similar directions, as in training, so that the
optimizer's estimates over several steps grow.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from elastic.engine import randomness
from elastic.engine.bit_equality import plain, same
from elastic.errors import TrainerError
from elastic.layout.regions import ALIGNMENT, MASTER, NARROW, SAME, CutRule, align
from elastic.memory import device
from elastic.memory import tensors as memory

_STEPS = 6
_SMALL = 2.0**-12  # squared below the epsilon of bfloat16 and of float32, and far inside the range of float16
_MOST_ELEMENTS, _FEWEST_ELEMENTS = 17_000, 5 * ALIGNMENT  # 130 x 130: some optimizers treat extents of 128 and more differently

T = TypeVar("T")
OptimizerState = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What the probe found: where tensors may be `cut`, whether `step` changes the gradients, and bytes of state per element.

    `scalars` gives, by name, an example of each state that does not have its parameter's shape; `dtypes` the dtype's name of each other
    state, `SAME` where it is that of what the optimizer updates.
    """

    cut: CutRule
    writes_gradients: bool
    state_bytes: float
    scalars: Mapping[str, Any]
    dtypes: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """A tensor like some of the model's. `state`: what the optimizer already holds for them. `share`: the elements it represents.

    `master`: it is the master of a parameter of another dtype.
    """

    group: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    state: OptimizerState
    share: float
    master: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _ProbeOutcome:
    """The results of a run: each chosen tensor and the states of its pieces, by sample number, and all groups' settings.

    `wrote`: `step` changed gradients. `changed`: an attribute of the optimizer that changed between steps.
    """

    tensors: Mapping[int, torch.Tensor]
    states: Mapping[int, Sequence[OptimizerState]]
    groups: Sequence[OptimizerState]
    wrote: bool
    changed: str | None


def probe(optimizer: Optimizer, *, masters: bool = False) -> Probed:
    """Probes copies of the optimizer, which itself does not change; with `masters`, on float32 tensors in place of narrower ones.

    Raises:
        TrainerError: if it cannot be spread over workers, or its state cannot move with the parameters; the message says why.
    """
    name = type(optimizer).__name__
    _check_kind(optimizer, name)
    samples = _samples(optimizer, masters=masters)
    trial = _Trials(optimizer, samples)
    everything = range(len(samples))
    with randomness.kept():
        before = _drawn()
        together = _tried(name, "", lambda: trial.run(everything))
        if not same(before, _drawn()):
            raise TrainerError(
                f"{name}.step() draws random numbers, so no other worker could repeat an update: use an optimizer whose update follows "
                f"from gradients and state{randomness.other_threads()}"
            )
        _check_outcome(name, together, trial)
        for owned in (everything[::2], everything[1::2], everything[:1], everything[:0]):
            part = _tried(name, f" where a worker owns {len(owned) or 'none'} of the parameters", lambda owned=owned: trial.run(owned))
            if (difference := _difference(together, part)) is not None:
                if (twice := _difference(together, trial.run(everything))) is not None:
                    raise TrainerError(
                        f"{name}.step() does not give the same bits twice for the same gradients ({twice}), so no other worker could "
                        "repeat an update: use another optimizer or implementation (such as fused=False)"
                    )
                raise TrainerError(
                    f"{name} is not elementwise: one parameter's update depends on another's, so it cannot be spread over workers "
                    f"({difference}). Use an optimizer that updates each element, or at least each tensor, on its own "
                    "(AdamW, SGD, Adafactor, Muon, ...), with a learning rate that a scheduler sets"
                )
        _check_dtypes(optimizer, name, samples)
        return Probed(
            cut=trial.cut(together),
            writes_gradients=together.wrote,
            state_bytes=_state_bytes(samples, together),
            scalars=_scalars(together),
            dtypes=_dtypes(together),
        )


def _check_dtypes(optimizer: Optimizer, name: str, samples: Sequence[_Sample]) -> None:
    """Refuses an optimizer that updates by the first dtype of a group, as Adafactor does by default. It shows where gradients are small."""
    dtypes: dict[int, dict[torch.dtype, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, sample in enumerate(samples):
        dtypes[sample.group][sample.dtype].append(index)
    for group, found in dtypes.items():
        if len(found) < 2:
            continue
        trial = _Trials(optimizer, samples, _SMALL)
        together = trial.run(index for owned in found.values() for index in owned)
        for owned in found.values():
            if (difference := _difference(together, trial.run(owned))) is not None:
                raise TrainerError(
                    f"{name} updates parameters of one dtype by those of another in the same group, so it cannot be spread over workers "
                    f"(group {group} has {', '.join(str(dtype).removeprefix('torch.') for dtype in found)}; {difference}). Give each dtype "
                    "a group of its own, or settings that do not depend on the dtype, such as eps=(1e-7, 1e-3) for Adafactor"
                )


def second(optimizer: Optimizer) -> Optimizer:
    """Returns another optimizer of the same kind, with the same group settings, no parameters and empty state."""
    other = copy.copy(optimizer)  # for an Optimizer this copies only groups, state and defaults
    for attribute, value in vars(optimizer).items():
        if (
            attribute != "step" and getattr(value, "__self__", None) is not optimizer
        ):  # a scheduler puts a wrapper of the user's `step` there
            setattr(other, attribute, value)
    other.state = defaultdict(dict)
    other.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
    return other


def _check_kind(optimizer: Optimizer, name: str) -> None:
    for attribute, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            raise TrainerError(
                f"{name} wraps another optimizer ({attribute}: {type(value).__name__}), whose state cannot be spread over workers: give "
                "the Trainer one optimizer that does all of it"
            )
    if foreign_keys := [key for key in optimizer.state if not isinstance(key, torch.Tensor)]:
        raise _no_parameters_state(name, foreign_keys[0])
    takes = [
        p for p in inspect.signature(type(optimizer).step).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if wanted := [p.name for p in takes[1:] if p.default is p.empty]:
        raise TrainerError(
            f"{name}.step() cannot be called without arguments (it requires {wanted[0]}); closures are not supported, since a step's loss "
            "is computed once, by several workers: use an optimizer that needs gradients only, such as AdamW, SGD or Muon"
        )


def _no_parameters_state(name: str, key: object) -> TrainerError:
    return TrainerError(
        f"{name} keeps state {key!r} that belongs to no parameter, so it could not move to another worker: keep it in the state of each "
        "parameter, or in its group"
    )


def _tried(name: str, where: str, act: Callable[[], T]) -> T:
    try:
        return act()
    except Exception as error:  # the user's optimizer may raise anything
        raise TrainerError(
            f"{name}.step() fails{where}, on tensors with as many dimensions as the model's ({type(error).__name__}: {error}). "
            "It must work with any parameters in its groups, also none, and use nothing about them but what is in groups and state"
        ) from error


def _check_outcome(name: str, outcome: _ProbeOutcome, trial: _Trials) -> None:
    if outcome.changed is not None:
        raise TrainerError(
            f"{name} has an attribute {outcome.changed!r} that changes from step to step, so it could not move to another worker or into a "
            "checkpoint: keep it in the state of each parameter, or in its group"
        )
    if trial.foreign_key is not None:
        raise _no_parameters_state(name, trial.foreign_key)
    if any(MASTER in state for states in outcome.states.values() for state in states):
        raise TrainerError(
            f"{name} keeps a state called {MASTER!r}, as the Trainer calls its own masters: give the state another name, or leave it out "
            "and give the Trainer master_weights=True"
        )
    still = all(same(tensor, trial.tensors[index]) for index, tensor in outcome.tensors.items())
    if still and not any(states[0] for states in outcome.states.values()) and outcome.tensors:
        raise TrainerError(
            f"{name}.step() changed nothing when it was tried on sample tensors in its groups: it must update all tensors in its groups"
        )


def _signature(value: Any) -> Any:
    """Returns a key that is equal for settings that differ only in amount: numbers count by their sign, strings without their digits."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype), _signature(value.item()) if value.numel() == 1 else None
    if isinstance(value, float):
        return "number", value > 0, value < 0
    if isinstance(value, str):
        return "".join(letter for letter in value if not letter.isdigit())
    if isinstance(value, tuple | list):
        return tuple(_signature(item) for item in value)
    return repr(value)


def _worked(dtype: torch.dtype, *, masters: bool) -> torch.dtype:
    """Returns the dtype in which the optimizer updates parameters of a dtype."""
    return torch.float32 if masters and str(dtype).removeprefix("torch.") in NARROW else dtype


def _samples(optimizer: Optimizer, *, masters: bool) -> list[_Sample]:
    """Returns two samples for each kind of parameter: those with the most elements and with the largest smallest extent."""
    kinds: dict[Any, list[tuple[int, torch.Tensor]]] = {}
    for number, group in enumerate(optimizer.param_groups):
        signature = tuple((key, _signature(value)) for key, value in group.items() if key not in ("params", "param_names"))
        for parameter in group["params"]:
            if parameter.requires_grad and parameter.numel():
                kinds.setdefault((signature, parameter.ndim, parameter.dtype), []).append((number, parameter))
    found = []
    for members in kinds.values():
        share = sum(parameter.numel() for _, parameter in members) / 2
        largest = max(members, key=lambda member: member[1].numel())
        widest = max(members, key=lambda member: (min(member[1].shape, default=1), member[1].numel()))
        for number, parameter in (largest, widest):
            shape = _shape(tuple(parameter.shape))
            dtype = _worked(parameter.dtype, masters=masters)
            state = _carried(optimizer.state.get(parameter, {}), parameter, shape, dtype)
            master = dtype != parameter.dtype
            found.append(_Sample(group=number, shape=shape, dtype=dtype, state=state, share=share, master=master))
    return found


def _shape(real: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a sample's shape: as many dimensions as the parameter, few enough elements to be fast, and enough to be cut."""
    if not real:
        return ()
    most = bisect_right(range(2, _MOST_ELEMENTS), _MOST_ELEMENTS, key=lambda most: math.prod(min(extent, most) for extent in real)) + 1
    *others, last = (min(extent, most) for extent in real)
    return (*others, max(last, -(-_FEWEST_ELEMENTS // math.prod(others))))


def _carried(state: Mapping[str, Any], parameter: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> OptimizerState:
    """Returns the state that the optimizer already holds (Adagrad creates it at construction), for a tensor of another shape and dtype.

    Empty if the state's shape does not show how to convert it.
    """
    found: OptimizerState = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape and name != "step":
            found[name] = memory.filled(shape, value.flatten()[0].item(), dtype if value.dtype == parameter.dtype else value.dtype)
        elif isinstance(value, torch.Tensor) and value.ndim and value.numel() > 1:
            return {}
        else:
            found[name] = copy.deepcopy(value)
    return found


class _Trials:
    """Runs the same steps on the same samples, each time with a new optimizer of the user's kind."""

    def __init__(self, optimizer: Optimizer, samples: Sequence[_Sample], scale: float = 1.0) -> None:
        self._optimizer, self._samples = optimizer, samples
        generator = torch.Generator().manual_seed(20)
        self.tensors: list[torch.Tensor] = []
        self._gradients: list[list[torch.Tensor]] = [[] for _ in range(_STEPS)]
        for sample in samples:
            value, direction, noise = (torch.randn(sample.shape, generator=generator) for _ in range(3))
            self.tensors.append(device.placed(value.to(sample.dtype)))
            for step, gradients in enumerate(self._gradients):
                other = noise.reshape(-1).roll(97 * step).view(sample.shape)
                gradients.append(device.placed(((0.8 * direction + 0.1 * value + 0.3 * other) * scale).to(sample.dtype)))
        self._used = sorted({sample.group for sample in samples})
        self.foreign_key: object = None

    def run(self, chosen: Iterable[int], *, pieces: bool = False) -> _ProbeOutcome:
        """Runs the steps on the chosen samples, whole or in pieces as owners of blocks have them. All groups exist; some may be empty."""
        chosen = list(chosen)
        trial = second(self._optimizer)
        for attribute, value in vars(trial).items():
            if attribute not in ("state", "param_groups") and plain(value):
                setattr(trial, attribute, copy.deepcopy(value))
        trial.param_groups = [_active(self._optimizer, self._optimizer.param_groups[number]) for number in self._used]
        tensors = {index: memory.copy(self.tensors[index]) for index in chosen}
        cuts = dict.fromkeys(chosen, _pieces if pieces else _whole)
        parameters = {index: [nn.Parameter(piece) for piece in cuts[index](tensors[index])] for index in chosen}
        for index, own in parameters.items():
            sample = self._samples[index]
            trial.param_groups[self._used.index(sample.group)]["params"] += own
            states = [_state_of(sample.state, index_of, sample.shape, cuts[index]) for index_of in range(len(own))]
            trial.state.update({piece: state for piece, state in zip(own, states, strict=True) if state})
        wrote, noted = False, {}
        for gradients in self._gradients:
            given = [(p, g, memory.copy(g)) for i in chosen for p, g in zip(parameters[i], cuts[i](gradients[i]), strict=True)]
            for parameter, _, gradient in given:
                parameter.grad = gradient
            trial.step()
            noted = noted or self._attributes(trial)
            wrote = wrote or not all(same(gradient, kept) for _, kept, gradient in given)
        known = {id(piece) for own in parameters.values() for piece in own}
        self.foreign_key = next((key for key in trial.state if id(key) not in known), self.foreign_key)
        now = self._attributes(trial)
        return _ProbeOutcome(
            tensors=tensors,
            states={index: [dict(trial.state.get(piece, {})) for piece in own] for index, own in parameters.items()},
            groups=[{key: value for key, value in group.items() if key != "params"} for group in trial.param_groups],
            wrote=wrote,
            changed=next((key for key in {**noted, **now} if not same(noted.get(key), now.get(key))), None),
        )

    @staticmethod
    def _attributes(trial: Optimizer) -> OptimizerState:
        """Returns the optimizer's attributes that are data, except groups and state."""
        mine = {attribute: value for attribute, value in vars(trial).items() if attribute not in ("state", "param_groups", "defaults")}
        return {attribute: copy.deepcopy(value) for attribute, value in mine.items() if plain(value)}

    def cut(self, together: _ProbeOutcome) -> CutRule:
        """Returns "block" if pieces give the same bits as the whole; otherwise, or if the optimizer fails on pieces, "tensor"."""
        try:
            sliced = self.run(range(len(self._samples)), pieces=True)
        except Exception:  # the user's optimizer may raise anything, for example if it requires matrices
            return "tensor"
        return "block" if _difference(together, sliced) is None else "tensor"


def _active(optimizer: Optimizer, group: Mapping[str, Any]) -> OptimizerState:
    """Returns a copy of a group's settings. Replaces a learning rate of 0 (the start of a warm-up), since it would hide all updates."""
    settings: OptimizerState = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
    rate = settings.get("lr")
    if rate is not None and float(rate) == 0.0:
        other = next((float(r) for r in (group.get("initial_lr"), optimizer.defaults.get("lr")) if r is not None and float(r) > 0), 1e-3)
        settings["lr"] = memory.filled(tuple(rate.shape), other, rate.dtype) if isinstance(rate, torch.Tensor) else other
    return {**settings, "params": []}


def _whole(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor]


def _pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    size = tensor.numel()
    inner = {ALIGNMENT, align(size // 3), align(2 * size // 3) + ALIGNMENT}
    edges = [0, *sorted(edge for edge in inner if 0 < edge < size), size]
    return [tensor.view(-1)[a:b] for a, b in itertools.pairwise(edges)]


def _state_of(
    state: OptimizerState, number: int, shape: tuple[int, ...], cut: Callable[[torch.Tensor], list[torch.Tensor]]
) -> OptimizerState:
    own = {name for name, value in state.items() if isinstance(value, torch.Tensor) and value.shape == shape and (shape or name != "step")}
    return {name: memory.copy(cut(value)[number]) if name in own else copy.deepcopy(value) for name, value in state.items()}


def _difference(together: _ProbeOutcome, other: _ProbeOutcome) -> str | None:
    """Returns how the outcome for some tensors, or for pieces of them, differs from that for all together; None if it does not."""
    values = [(together.tensors[index], tensor) for index, tensor in other.tensors.items()]
    if apart := [(one, two) for one, two in values if not same(one, two)]:
        count = sum(int((one != two).sum()) for one, two in apart)
        most = max(float((one.double() - two.double()).abs().max()) for one, two in apart)
        return f"{count} of {sum(one.numel() for one, _ in values)} elements, updated together and apart, differ by up to {most:.3g}"
    for index, pieces in other.states.items():
        (whole,) = together.states[index]
        for name in {**whole, **pieces[0]}:
            found = [piece[name] for piece in pieces if name in piece]
            if name not in whole or len(found) < len(pieces) or not _joined(whole[name], found, together.tensors[index].shape):
                return f"the state {name!r} differs when tensors are updated again, or apart"
    for number, (one, two) in enumerate(zip(together.groups, other.groups, strict=True)):
        for key in {**one, **two}:
            if not same(one.get(key), two.get(key)):
                return f"{key!r} of group {number} becomes {one.get(key)} from all tensors and {two.get(key)} from some of them"
    return None


def _joined(whole: Any, pieces: Sequence[Any], shape: torch.Size) -> bool:
    """Returns whether the pieces' states match a tensor's: joined if the state has the tensor's shape, otherwise each one equal to it."""
    if isinstance(whole, torch.Tensor) and whole.shape == shape:
        return all(isinstance(piece, torch.Tensor) for piece in pieces) and same(
            whole.reshape(-1), torch.cat([piece.reshape(-1) for piece in pieces])
        )
    return all(same(whole, piece) for piece in pieces)


def _state_bytes(samples: Sequence[_Sample], outcome: _ProbeOutcome) -> float:
    """Returns the average bytes of state, masters included, per element of the model."""
    total = 0.0
    for index, sample in enumerate(samples):
        values = [value for value in outcome.states[index][0].values() if isinstance(value, torch.Tensor) and value.ndim]
        own = outcome.tensors[index].nbytes if sample.master else 0
        total += sample.share * (own + sum(value.numel() * value.element_size() for value in values)) / outcome.tensors[index].numel()
    return total / max(1.0, sum(sample.share for sample in samples))


def _scalars(outcome: _ProbeOutcome) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index, tensor in outcome.tensors.items():
        for name, value in outcome.states[index][0].items():
            if not (isinstance(value, torch.Tensor) and value.ndim and value.shape == tensor.shape):
                found.setdefault(name, value)
    return found


def _dtypes(outcome: _ProbeOutcome) -> dict[str, str]:
    found: dict[str, str] = {}
    for index, tensor in outcome.tensors.items():
        for name, value in outcome.states[index][0].items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape == tensor.shape:
                found[name] = SAME if value.dtype == tensor.dtype else str(value.dtype).removeprefix("torch.")
    return found


def _drawn() -> Any:
    return *randomness.torch_states(), np.random.get_state(), random.getstate()
