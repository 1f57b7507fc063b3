"""The Trainer behind a plain loop: its one layer is the loop's body."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NoReturn

from elastic.engine.decision import Apply
from elastic.engine.profile import LayerProfile
from elastic.errors import TrainerError
from elastic.worker.plain.body import Body
from elastic.worker.plain.source import Stream
from elastic.worker.trainer import Trainer


def _the_body(output: Any, micro_batch: Any) -> Any:
    """The loss of a micro-batch, which the body has computed; with its weight, if it has given one."""
    loss, weight = output
    return loss if weight is None else (loss, weight)


class PlainTrainer(Trainer):
    """A Trainer whose layer's cost was `measured` by the loop, and whose scheduler is stepped by it."""

    def __init__(self, body: Body, optimizer: Any, stream: Stream, measured: LayerProfile, **options: Any) -> None:
        self._by_trial = measured
        super().__init__(body, _the_body, optimizer, stream, **options)

    def _measured(self) -> LayerProfile:
        return self._by_trial

    def _step_scheduler(self, _: Apply) -> None:
        pass

    def complete(self) -> None:
        """Waits until the step that was handed out is complete everywhere: its body is not to be interrupted by steps taken again."""
        self._runtime.complete()
        self._runtime.at("body", self._history.step)

    @property
    def keys_all(self) -> bool:
        """Whether steps key Python's and NumPy's generators too."""
        return self._engine.executor.generators.all_keyed

    def unrecorded(self) -> AbstractContextManager[None]:
        """Returns a context in which forwards change no running statistics."""
        return self._model.running.statistics.during(0, None)

    def evaluate(self, dataset: Any, *, micro_batches: int | None = None) -> NoReturn:
        raise TrainerError(
            "evaluate() needs a loss that the runtime knows, and here it is in the loop's body: evaluate by a loop of your own, under "
            "torch.no_grad(), on every worker where loader.report is not None"
        )
