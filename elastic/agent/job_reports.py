"""What workers report for the user, besides the members of the job: saves, lines of metrics, skipped steps, the job's value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastic.agent.save_summary import SaveSummary
from elastic.agent.supervision import WorkerProcess
from elastic.host.channel import Message
from elastic.observe.console import say
from elastic.worker import changed_model
from elastic.worker.metrics import MetricFiles


class JobReports:
    """The reports of one job. `grace_s` is how long workers may take to exit."""

    def __init__(self, grace_s: float) -> None:
        self.returned: dict[str, Any] = {}  # the value of the leader's train_fn, sent before its worker has finished
        self._grace_s = grace_s
        self._saves = SaveSummary()
        self._metrics = MetricFiles(say)
        self._skipped: set[int] = set()
        self._unproven = False  # whether the user was warned of a model that was changed behind the last loop
        self._lasting = False  # whether the user was informed of threads that have not ended

    def heard(self, worker: WorkerProcess, message: Message) -> None:
        """Handles a worker's message, if it is such a report."""
        kind = message["type"]
        if kind == "save":
            self._saves = self._saves.heard(message["step"], message["reason"])
        elif kind == "log":
            self._metrics.heard(message)
        elif kind == "skipped" and message["step"] not in self._skipped:
            self._skipped.add(message["step"])
            say(f"step {message['step']} is skipped: {message['reason']}")
        elif kind == "returned":
            self.returned = {"value": message["value"]}
        elif kind == "lasts":
            self._lasts(worker, message["threads"])

    def unlike(self, members: Sequence[WorkerProcess]) -> str | None:
        """Returns what is wrong with the models of these workers, the leader first, behind their last loops; None if they are alike."""
        told = {worker.number: worker.result["told"] for worker in members if worker.result is not None and worker.result["told"]}
        if (difference := changed_model.unlike(told, members[0].number)) is not None:
            return difference
        if not self._unproven and (warning := changed_model.unproven(told)) is not None:
            self._unproven = True
            say(f"warning: {warning}")
        return None

    def complete(self, outcome: Message, incidents: list[dict[str, Any]]) -> None:
        """Adds the reports to the outcome of a job that has ended well."""
        outcome["incidents"] = incidents
        outcome["saves"] = self._saves.to_json()
        outcome["skipped"] = sorted(self._skipped)
        if self._saves.warning is not None:
            say(f"warning: {self._saves.warning}")

    def close(self) -> None:
        """Closes the files of metrics, once all workers have ended."""
        self._metrics.close()

    def _lasts(self, worker: WorkerProcess, threads: list[str]) -> None:
        """Informs the user, once, that a worker has returned and cannot end, since threads of train_fn still run."""
        if not self._lasting:
            self._lasting = True
            say(
                f"worker {worker.number} has returned from train_fn and waits for threads that train_fn started and did not end: "
                f"{', '.join(threads)}. It is killed {self._grace_s:.0f} s after the last worker has returned: let train_fn "
                "end and join its threads, or make them daemons"
            )
