"""The kinds of faults: how each is injected, what it needs, and how long a stall it may cause."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.errors import SettingsError
from elastic.observe.activity import RECOVERY_PHASES, STEP_PHASES

AT_REST = ("forward", "backward")
"""The phases in which a worker's optimizer state does not change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of fault.

    `injected` says how, `needs` what the machine or the job must have. `seconds` is how long it lasts by default, None if it is over at
    once. `noticed_s` is the time within which the runtime promises to act on it. `hosts`: the least number of hosts, `workers` that of
    workers on all of them. `phases` are those that it can wait for. `weight` is its share of random schedules. `own_etcd`: it needs an etcd
    outside the job. `shared`: it needs a job that other hosts can join.
    """

    name: str
    injected: str
    needs: str = "nothing"
    seconds: float | None = None
    noticed_s: float = 0.5
    hosts: int = 1
    workers: int = 1
    phases: tuple[str, ...] = ()
    weight: float = 1.0
    own_etcd: bool = False
    shared: bool = False


ALL = (
    Kind(name="kill", injected="SIGKILL to one worker", phases=STEP_PHASES, weight=3.0),
    Kind(
        name="kill-many",
        injected="SIGKILL to `count` workers of one host at once (all of them if count is larger)",
        phases=STEP_PHASES,
        weight=2.0,
    ),
    Kind(
        name="stop",
        injected="SIGSTOP to one worker; SIGCONT after `seconds` if it still lives",
        phases=STEP_PHASES,
        seconds=6.0,
        noticed_s=1.5,
    ),
    Kind(
        name="slow",
        injected="SIGSTOP and SIGCONT in turns: one worker gets 1/`factor` of its time for `seconds`",
        phases=STEP_PHASES,
        seconds=4.0,
        noticed_s=6.0,
    ),
    Kind(
        name="kill-during-recovery",
        injected="SIGKILL to one worker, and to another one as soon as that is in `phase` of the recovery (by default in any)",
        workers=2,
        phases=RECOVERY_PHASES,
        noticed_s=1.0,
    ),
    Kind(name="kill-joiner", injected="SIGKILL to one worker, and to its replacement before that is a member"),
    Kind(
        name="corrupt",
        injected="one bit of optimizer state flips in a worker's segment, while that is stopped for a moment of its computing",
        phases=AT_REST,
        needs="a kernel with memfd, and an optimizer that has state",
        noticed_s=1.0,
    ),
    Kind(
        name="agent-kill",
        injected="SIGKILL to the agent of one host. On one host the job ends, and is started again as a scheduler does (exit code 75)",
        noticed_s=4.0,
        weight=0.5,
    ),
    Kind(
        name="disk-full",
        injected="the run directories lie on a small tmpfs of their own, which is filled for `seconds`",
        needs="root, to mount the tmpfs",
        seconds=3.0,
        noticed_s=4.0,
    ),
    Kind(name="etcd-restart", injected="SIGKILL to etcd, which is started again on its data", noticed_s=1.0),
    Kind(
        name="etcd-down",
        injected="SIGKILL to etcd, and it is started again after `seconds`; recoveries wait for it",
        seconds=4.0,
        own_etcd=True,
        weight=0.5,
    ),
    Kind(
        name="etcd-full",
        injected="etcd's alarm NOSPACE is raised for `seconds`: it serves reads and refuses writes",
        seconds=4.0,
        own_etcd=True,
        weight=0.5,
    ),
    Kind(
        name="join",
        injected="another host is started, with as many workers as the others; without namespaces or several hosts, as another agent here",
        shared=True,
        noticed_s=2.0,
        weight=0.5,
    ),
    Kind(
        name="drain",
        injected="SIGTERM to `elastic agent` of one host; a new host is started `seconds` after it has left",
        seconds=1.0,
        hosts=2,
        shared=True,
        noticed_s=2.0,
        weight=0.5,
    ),
    Kind(
        name="partition",
        injected="the cable of one host is cut for `seconds`: nothing is sent, and nothing is closed",
        needs="network namespaces (root), or TCP proxies in their place",
        seconds=6.0,
        hosts=2,
        shared=True,
        noticed_s=4.5,
    ),
    Kind(
        name="delay",
        injected="all that one host sends arrives `factor` ms late for `seconds` (netem; by proxies where there are no namespaces)",
        needs="network namespaces and the kernel's netem, or TCP proxies in their place",
        seconds=3.0,
        hosts=2,
        shared=True,
        noticed_s=4.0,
    ),
    Kind(
        name="host-loss",
        injected="a host's cable is cut and its power too: all its processes get SIGKILL; a new host is started after `seconds`",
        needs="network namespaces (root), or TCP proxies in their place",
        seconds=2.0,
        hosts=2,
        shared=True,
        noticed_s=4.5,
    ),
)
KINDS = {kind.name: kind for kind in ALL}
ONE_HOST = tuple(kind.name for kind in ALL if kind.hosts == 1 and not kind.shared)
"""The kinds that a job of one host can have."""

END_A_HOST = ("agent-kill", "host-loss", "partition", "drain")
"""The kinds by which a job of several hosts loses one."""


def kind_of(name: str) -> Kind:
    """Returns the kind of this name. Raises SettingsError with all names."""
    if not isinstance(name, str) or name not in KINDS:
        raise SettingsError(f"there is no fault {name!r}: use {', '.join(KINDS)} (`elastic chaos list` describes them)")
    return KINDS[name]
