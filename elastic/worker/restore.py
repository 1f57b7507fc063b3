"""Converts between a worker's memory and a checkpoint: the runs of its shards to save, and the state of a view read from disk.

A worker reads only the runs that its place in the layout needs; the layout that wrote them does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from elastic.checkpoint.dtypes import dtype_of, name_of
from elastic.checkpoint.state import PARAM, Contents, DirectSource
from elastic.engine.model import LayeredModel
from elastic.engine.partial import partial
from elastic.engine.shard import RUN, Scalars, Shard, in_memory
from elastic.engine.view_state import ViewState
from elastic.errors import CheckpointError
from elastic.layout.layout import Interval
from elastic.layout.regions import MASTER, SAME, CutRule, ModelSpec, ParameterSpec
from elastic.memory.tensors import filled, lasting
from elastic.view import View

_AT_ONCE = 1 << 20
"""Elements that are converted at once, in memory besides the state's."""


class RestoredRun(NamedTuple):
    """A run of one state of a parameter: `values` are its elements `[start, ...)`, in the worker's memory."""

    name: str
    state: str
    start: int
    values: torch.Tensor


def runs(shard: Shard, scalars: Scalars, spec: ModelSpec) -> Iterator[RestoredRun]:
    """Yields all runs in a shard's memory, by parameter, without padding."""
    for parameter, start, stop in shard.parameters(spec):
        held = [PARAM, *(state for state, value in scalars.get(parameter.name, {}).items() if in_memory(value))]
        for state in held:
            yield RestoredRun(parameter.name, state, shard.interval.start + start - parameter.start, shard.memory[state][start:stop])
        for state, value in scalars.get(parameter.name, {}).items():
            if is_whole(value, spec.cut):
                yield RestoredRun(parameter.name, state, 0, value.reshape(-1))


def is_whole(value: Any, cut: CutRule) -> bool:
    """Returns whether a state is a tensor of another shape than its parameter, such as row sums; the parameter's owner has all of it."""
    return cut == "tensor" and isinstance(value, torch.Tensor) and value.ndim > 0


def numbers(scalars: Scalars, cut: CutRule = "block") -> dict[str, dict[str, float | int | bool]]:
    """Returns the numbers among the scalars, such as step counts, by parameter and state."""
    found: dict[str, dict[str, float | int | bool]] = {}
    for name, states in scalars.items():
        for state, value in states.items():
            if not in_memory(value) and not is_whole(value, cut):
                found.setdefault(name, {})[state] = value.item() if isinstance(value, torch.Tensor) else value
    return found


def restored_state(
    worker: int,
    model: LayeredModel,
    view: View,
    source: DirectSource,
    step: int,
    examples: Mapping[str, Any] = MappingProxyType({}),
    dtypes: Mapping[str, str] = MappingProxyType({}),
) -> ViewState:
    """Reads the state that `worker` begins `view` with into its layers' memory; `step` is the newest step in the checkpoint.

    `examples` maps a number among the optimizer's states to its form in memory: a tensor, or a number of that type. `dtypes` has the dtypes
    of its other states, into which they are converted where checkpoint or job has masters, and the other has none.

    Raises:
        CheckpointError: if the checkpoint is not of this model, lacks something, or is damaged. The model is unusable then.
    """
    check_fits(source.contents, model)
    model.hold(view.layout.layers_of(worker), keep=False)
    for index, flat in model.flats.items():
        for parameter in model.spec.layers[index].parameters:
            _read(source, parameter.name, PARAM, 0, flat[parameter.start : parameter.stop])
    for (home, start), memory in model.tied.items():
        parameter = next(each for each in model.spec.layers[home].parameters if each.start == start)
        _read(source, parameter.name, PARAM, 0, memory[: parameter.size])
    _restore_rest(model, source)
    model.watch.renew()
    model.running.record(step)
    owned, kept = [], []
    for layer in view.layout.layers:
        for interval in layer.intervals:
            if interval.owner == worker:
                run = model.run(layer.layer, interval.start, interval.stop)
                owned.append(_shard(model.spec, layer.layer, interval, source, run, examples, dtypes))
            elif worker in interval.replicas:
                kept.append(_shard(model.spec, layer.layer, interval, source, None, examples, dtypes))
    return ViewState(step=step, owned=owned, kept=kept)


def check_fits(contents: Contents, model: LayeredModel) -> None:
    """Raises CheckpointError, naming the first difference, unless names, shapes and dtypes in the checkpoint are those of the model.

    Parameters with masters may also be float32 in the checkpoint, as in those of other programs.
    """
    mastered = {p.name for layer in model.spec.layers for p in layer.parameters if model.spec.has_masters(layer.index)}
    wanted: dict[str, tuple[tuple[int, ...], str]] = {p.name: (p.shape, p.dtype) for layer in model.spec.layers for p in layer.parameters}
    wanted |= {name: form(tensor) for name, tensor in unplaced(model).items()}
    for name, (shape, dtype) in wanted.items():
        spec = contents.tensors.get(name, {}).get(PARAM)
        if spec is None:
            raise CheckpointError(f"the checkpoint has no {name}, which the model has")
        dtypes = (dtype, "float32") if name in mastered else (dtype,)
        if tuple(spec.shape) != shape or spec.dtype not in dtypes:
            raise CheckpointError(f"{name} is {spec.dtype} {tuple(spec.shape)} in the checkpoint and {dtype} {shape} in the model")
    if strangers := sorted(set(contents.tensors) - set(wanted) - set(contents.ties)):
        raise CheckpointError(f"the checkpoint has {strangers[0]}, which the model does not have ({len(strangers)} such names)")


def _read(source: DirectSource, name: str, state: str, start: int, values: torch.Tensor) -> None:
    """Fills flat memory with a run, converted to the memory's dtype."""
    if source.contents.tensors[name][state].dtype == name_of(values.dtype):
        source.read_into(name, state, start, values)
        return
    for first in range(0, values.numel(), _AT_ONCE):
        part = values[first : first + _AT_ONCE]
        part.copy_(source.read(name, state, start + first, start + first + part.numel()))


def _shard(
    spec: ModelSpec,
    layer: int,
    interval: Interval,
    source: DirectSource,
    run: torch.Tensor | None,
    examples: Mapping[str, Any],
    dtypes: Mapping[str, str],
) -> Shard:
    """Reads one interval with all its states; `run` is its parameters' memory if they were read before."""
    shard = Shard(layer=layer, interval=interval, memory={} if run is None else {PARAM: run})
    masters = spec.has_masters(layer)
    for parameter, start, stop in shard.parameters(spec):
        offset = interval.start + start - parameter.start
        states = source.contents.tensors[parameter.name]
        same = (MASTER in states) == masters
        for state, form in states.items():
            if (state == PARAM and run is not None) or not spec.has(layer, state):
                continue
            if form.shape != parameter.shape:
                if spec.cut != "tensor":
                    raise CheckpointError(
                        f"the optimizer's state {state!r} of {parameter.name} has shape {form.shape} in the checkpoint, which does not fit"
                    )
                values = source.read(parameter.name, state, 0, math.prod(form.shape)).view(form.shape)
                shard.scalars.setdefault(parameter.name, {})[state] = values
                continue
            if state not in shard.memory:
                dtype = form.dtype if same and state != PARAM else spec.dtype(layer, state, dtypes.get(state, SAME))
                shard.memory[state] = lasting(interval.elements, dtype_of(dtype))
            _read(source, parameter.name, state, offset, shard.memory[state][start:stop])
        scalars = shard.scalars.setdefault(parameter.name, {})
        found = {} if layer in spec.frozen else _scalars(parameter, source.contents, examples)
        scalars.update({state: value for state, value in found.items() if state != MASTER})
        if masters:
            scalars[MASTER] = RUN
            if MASTER not in states:
                master = shard.memory.setdefault(MASTER, lasting(interval.elements, dtype_of(spec.dtype(layer, MASTER))))
                _read(source, parameter.name, PARAM, offset, master[start:stop])
    shard.scalars = {name: values for name, values in shard.scalars.items() if values}
    return shard


def _scalars(parameter: ParameterSpec, contents: Contents, examples: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a parameter's scalars in the form of `examples`; without an example as in torch: `step` is a tensor, others are numbers."""
    states = contents.tensors[parameter.name].items()
    found: dict[str, Any] = {state: RUN for state, form in states if state != PARAM and form.shape == parameter.shape}
    for state, value in contents.scalars.get(parameter.name, {}).items():
        example = examples.get(state, torch.tensor(0.0) if state == "step" else None)
        if isinstance(example, torch.Tensor) and example.numel() == 1:
            found[state] = filled(example.shape, value, example.dtype).to(example.device)
        elif isinstance(example, bool | int | float):
            found[state] = type(example)(value)
        else:
            found[state] = value
    return found


def unplaced(model: LayeredModel) -> dict[str, torch.Tensor]:
    """Returns what every worker has of the model's state_dict: what is not trained, and lies in no vector."""
    others = {**{name: model.parameter(name) for name in model.frozen}, **dict(persistent_buffers(model.root))}
    return {name: tensor for name, tensor in others.items() if not model.is_placed(name)}


def _restore_rest(model: LayeredModel, source: DirectSource) -> None:
    with torch.no_grad():
        for name, tensor in unplaced(model).items():
            tensor.copy_(source.read(name, PARAM, 0, tensor.numel()).view(tensor.shape))


def persistent_buffers(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the buffers that are in the model's state_dict."""
    with partial():
        held = {id(tensor) for tensor in root.state_dict(keep_vars=True).values()}  # a model may have other names there
    return ((name, buffer) for name, buffer in root.named_buffers() if id(buffer) in held)


def form(tensor: torch.Tensor) -> tuple[tuple[int, ...], str]:
    """Returns shape and dtype name."""
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
