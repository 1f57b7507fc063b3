"""The functions that inject faults, one for each kind; each records the proof that the fault took effect."""

from __future__ import annotations

from collections.abc import Callable

from elastic.chaos.inject import control, disk, etcd, memory, network, recoveries, workers
from elastic.chaos.scene import Effect, Scene

INJECT: dict[str, Callable[[Scene, Effect], None]] = {
    "kill": workers.kill,
    "kill-many": workers.kill_many,
    "stop": workers.stop,
    "slow": workers.slow,
    "kill-during-recovery": recoveries.kill_during_recovery,
    "kill-joiner": recoveries.kill_joiner,
    "corrupt": memory.corrupt,
    "agent-kill": control.agent_kill,
    "join": control.join,
    "drain": control.drain,
    "disk-full": disk.disk_full,
    "etcd-restart": etcd.restart,
    "etcd-down": etcd.down,
    "etcd-full": etcd.full,
    "partition": network.partition,
    "delay": network.delay,
    "host-loss": network.host_loss,
}
