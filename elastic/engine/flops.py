"""Counts the floating-point operations of a computation, for the figure MFU.

Products of matrices, convolutions and attention count, by the formulas of `torch.utils.flop_counter`: 2 m n k for a product. All else is
little and does not count. What a backward computes again (activation checkpointing) does not count either: MFU is about the operations
that the model needs (PaLM, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_UNKNOWN = ("rnn", "lstm", "gru")  # operators of products that no formula is known for
_aten: Any = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_ON_CPU = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operators that torch's list lacks."""


class FlopCount(TorchDispatchMode):
    """Counts what is computed while it is entered, which may be several times. `flops` is too little if not all of it is `known`."""

    supports_higher_order_operators = True

    def __init__(self, *, known: bool = True) -> None:
        super().__init__()
        self.flops, self.known = 0, known
        self._backward = False

    def backward(self) -> FlopCount:
        """Returns this, to be entered for backwards only from now on: a forward in them is computed again, and does not count."""
        self._backward = True
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operator = getattr(func, "_overloadpacket", func)
        formula = _ON_CPU.get(operator) or flop_registry.get(operator)
        if formula is None:
            self.known = self.known and not any(part in str(func) for part in _UNKNOWN)
        elif not (torch.is_grad_enabled() and (self._backward or _in_backward())):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of(counts: Sequence[FlopCount]) -> list[int]:
    """Returns the operations of each; zeros if a part of them is unknown."""
    return [count.flops if all(each.known for each in counts) else 0 for count in counts]


def _in_backward() -> bool:
    """Whether autograd runs a backward. Where that computes a part of its forward again, it records a graph, else not."""
    return torch._C._current_graph_task_id() != -1


def may_compile() -> bool:
    """Whether `torch.compile` may have been used: under a mode, compiled code would be given up for good."""
    return "torch._dynamo" in sys.modules


@contextmanager
def counted(count: FlopCount) -> Iterator[None]:
    """Counts what is computed in the block. Compiled code runs as it was written, so that its operators are seen."""
    with eager(), count:
        yield


def eager() -> AbstractContextManager[Any]:
    """Returns a context in which compiled code runs as it was written."""
    return torch.compiler.set_stance("force_eager") if may_compile() else nullcontext()
