"""What `job.prepare` returns for the optimizer and its scheduler: they look like the user's, and tell the loop what is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from elastic.engine.bit_equality import same
from elastic.errors import TrainerError
from elastic.worker.plain.loop import Loop, Place


class PreparedOptimizer(Optimizer):
    """The user's optimizer, whose update the runtime makes: `step()` ends a micro-batch's part in it.

    Its groups are the user's own, with their settings. Once the loop has begun, their tensors are the pieces of parameters that this worker
    updates.
    """

    def __init__(self, optimizer: Optimizer, loop: Loop, number: int = 0) -> None:  # without Optimizer.__init__: it has no state of its own
        self._own, self._loop, self._number = optimizer, loop, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_own"], name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._own.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._own.state

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._own.defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks for before it calls `step`."""
        raise TrainerError(
            "a GradScaler cannot be used: it decides on each worker by the gradients of one micro-batch whether to skip the update. Use "
            "torch.autocast with bfloat16, which needs no scaling, or GradScaler(enabled=False)"
        )

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Ends the body's part in the step, or in one of its updates. The step is committed if then `loader.report` is not None.

        Raises:
            TrainerError: if the body has not called backward, has called step already, or has changed gradients; or for a closure. With
                several optimizers, if it is not the step that the first body called here.
        """
        if closure is not None:
            raise TrainerError("optimizer.step(closure) would compute losses again after an update, as L-BFGS does: this is not supported")
        self._loop.step(self._number)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients that backwards have left in the model's parameters; with several optimizers, in this one's."""
        self._loop.zero_grad(self._number, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The user's optimizer's, before the loop. Raises TrainerError later: each worker has a part of it."""
        self._whole("state_dict()", "to save the training, give job.prepare checkpoint=, and call loader.save() for a save at once")
        return self._own.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The user's optimizer's, before the loop. Raises TrainerError later."""
        self._whole("load_state_dict()", "call it before the loop")
        self._own.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The user's optimizer's, before the loop. Raises TrainerError later."""
        self._whole("add_param_group()", "call it before the loop; what is trained later can be in a group with learning rate 0")
        self._own.add_param_group(param_group)

    def _whole(self, call: str, advice: str) -> None:
        if self._loop.built:
            raise TrainerError(f"optimizer.{call} is called after the loop has begun, when each worker has a part of its state: {advice}")

    def __repr__(self) -> str:
        return repr(self._own)


class PreparedScheduler:
    """The user's scheduler: `step()` has an effect once a step, behind the body that ends it, or once after a loop."""

    def __init__(self, scheduler: Any, loop: Loop) -> None:
        self._own, self._loop = scheduler, loop
        self._given: tuple[int, Any] | None = None  # the arguments of the first call in a step, with the step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_own"], name)

    def step(self, *arguments: Any, **options: Any) -> None:
        """Steps the scheduler if the body has ended a step; else does nothing. After a loop that took no step here, it does nothing either.

        Raises:
            TrainerError: before the body's optimizer.step(), or with other arguments than another body of this step has given.
        """
        place = self._loop.place
        self._check_given((arguments, options))
        if place is Place.BODY:
            raise TrainerError(
                "scheduler.step() is called before optimizer.step() in the body of the loop: call it after it, or after all optimizers'"
            )
        if place is Place.COMMITTED or (place is Place.OUTSIDE and self._loop.took):
            if self._loop.resumed_at is not None and (optimizer := getattr(self._own, "optimizer", None)) is not None:
                optimizer._opt_called = True  # what schedulers look for; it may be another process that has taken the steps
            self._own.step(*arguments, **options)

    def _check_given(self, given: tuple[Any, Any]) -> None:
        step = self._loop.body_step
        if step is None or given == ((), {}):
            return
        if self._given is None or self._given[0] != step:
            self._given = step, given
        elif not same(self._given[1], given):
            raise TrainerError(
                f"scheduler.step() has other arguments in another body of step {step}: a step has several bodies, and how many run on a "
                "worker depends on the layout. Count steps, not bodies: call it under `if loader.report is not None:`, with values of the "
                "report, such as scheduler.step((loader.report.step + 1) / len(loader)), or scheduler.step(loader.report.loss)"
            )
