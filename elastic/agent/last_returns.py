"""Decides how a job ends in which some workers have returned from train_fn and the others cannot, since they miss one that is lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from elastic.agent.supervision import WorkerProcess
from elastic.host.channel import Message


def without_the_rest(
    failure: Message, members: Sequence[WorkerProcess], steps: Iterable[int], value: Mapping[str, Any]
) -> tuple[Message, str]:
    """Returns the outcome, and a sentence about it; `failure` and no sentence if the job cannot end well.

    It ends well if the `members` that have not returned had no step left either: `steps` are those that they were seen in. Then nothing is
    missing but their return, since who has returned has taken part in every step, save and collective call. The job's value is the one that
    the first member has told before (`value`) or with its return, else that of the first one that stands in for it. One must be known;
    what a train function returns on the leader only is lost.
    """
    returned = [(worker, worker.result) for worker in members if worker.result is not None]
    last = max((result["step"] for _, result in returned if result["step"] is not None), default=None)
    rest = [worker for worker in members if worker.result is None]
    if last is None or any(step > last for step in [*steps, *(worker.step for worker in rest if worker.step is not None)]):
        return failure, ""
    numbers = [worker.number for worker, _ in returned]
    told = value if members[0].result is None else {"value": members[0].result["value"]}
    others = [(worker.number, {"value": result["value"]}) for worker, result in returned if result["valued"]]
    if not told and not others:
        why = f"all steps were done, and workers {numbers} have returned, but the value of the job is that of worker {members[0].number}"
        return {**failure, "message": f"{failure['message']}; {why}"}, ""
    sentence = (
        f"{failure['message']}. All steps were done, and workers {numbers} have returned from train_fn: the job has ended well, although "
        f"workers {[worker.number for worker in rest]} have not returned"
    )
    if not told:
        number, told = others[0]
        sentence = f"{sentence}. The job's value is that of worker {number}, since worker {members[0].number} cannot tell its own"
    return {"type": "done", "stopped": returned[0][1]["stopped"], **told}, sentence
