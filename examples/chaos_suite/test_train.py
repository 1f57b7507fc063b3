"""Tests the training script under faults, with the fixture `chaos` of Elastic's pytest plug-in.

python -m pytest examples/chaos_suite            # about a minute; where Elastic is installed, pytest finds the plug-in by itself
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SCRIPT = f"{Path(__file__).with_name('train.py')}:train"


def test_the_loss_falls_although_a_worker_is_killed_and_another_one_stopped(chaos: Any) -> None:
    faults = chaos(SCRIPT, 60, workers=3)
    faults.kill(worker=2, at_step=12, phase="backward").stop(worker=1, at_step=30, seconds=2)
    outcome = faults.run()
    assert outcome.fired == {"kill": 1, "stop": 1}
    assert outcome.losses[-1] < outcome.losses[0]


def test_all_workers_may_be_killed_at_once(chaos: Any) -> None:
    outcome = chaos(SCRIPT, 40, workers=2, stages=2).kill_many(count=2, at_step=10).run()
    assert len(outcome.losses) == 40
    assert "death" in [incident["kind"] for incident in outcome.incidents]


def test_a_job_that_lost_its_host_goes_on_from_its_checkpoint(chaos: Any) -> None:
    outcome = chaos(SCRIPT, 60, workers=2, checkpoint_every=10).agent_kill(at_step=35).run()
    assert outcome.fired == {"agent-kill": 1}
