"""Every exception the runtime raises on purpose.

    ElasticError
    ├── SettingsError            an argument is wrong: names it and what to do (also a ValueError)
    │   ├── NameTaken            another job has the job's name
    │   ├── PlanError            no plan exists for this request
    │   ├── TrainFunctionError   train_fn cannot be imported by another process
    │   └── TrainerError         model, loss, data or optimizer cannot be trained as given
    ├── NotInJob                 the call is allowed only in a worker of a running job
    ├── LayoutError              a layout breaks an invariant
    │   └── CoverageLost         no live worker holds a needed run of state
    │       └── NothingSaved     the same, and no checkpoint has been saved yet
    ├── CopiesConflict           survivors hold different copies of what must be equal
    │   └── StateUnproven        copies of the state differ, nothing shows which is right, and no older state is in memory
    ├── MemoryDamaged            memory changed while nothing wrote to it, or copies differ: wrong copies are discarded
    ├── GateRefused              a migration must not commit (`check`: the name of the check that failed)
    ├── LinkError                a link could not be made, or broke its protocol
    │   └── PeerLost             the process at the other end is gone
    ├── Interrupted              a wait was cancelled
    ├── EtcdUnavailable          etcd cannot be started, reached or logged in to
    │   ├── EtcdMissing          no private etcd can be started here
    │   ├── EtcdFull             etcd answers, but has no space left to write
    │   └── EtcdRefused          etcd answers, and refuses permanently: a retry does not help
    ├── Conflict                 a compare-and-swap lost: another client wrote first
    │   └── Deposed              another agent coordinates the job
    ├── MismatchError            workers disagree on what must be equal
    │   └── HostRefused          this host's settings, code or versions are not the job's
    ├── HostUnfit                this host failed its check before it joined a job
    ├── CheckpointError          a checkpoint cannot be read, written or mapped: names file and reason
    │   └── CheckpointDamaged    its contents cannot be read, or are not what was written: an older one may be good
    ├── NonFinite                a loss or gradient became NaN or infinite (names step and micro-batch)
    ├── PowerError               a GPU's clocks or power cannot be read or set (`condition`: which of the known reasons)
    └── JobFailed                the job ended with an error of one of its workers
        └── NameLost             another job has taken this job's name at etcd

Terminated is outside this tree, a SystemExit: SIGTERM or SIGHUP arrived, and the job has stopped.

`exit_code`: what `elastic run` and `elastic agent` exit with, see `elastic.cli.exit_codes`.
`surely_not_done`: an operation on another process surely did not happen (True), or may have happened (False).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class ElasticError(Exception):
    """Base of all of them."""

    surely_not_done: bool = True
    exit_code: ClassVar[int] = 1


class SettingsError(ElasticError, ValueError):
    """An argument is wrong."""

    exit_code = 2


class NameTaken(SettingsError):
    """Another job has the job's name. One that was killed has it for some seconds."""

    exit_code = 75


class PlanError(SettingsError):
    """No plan exists for this request."""


class TrainFunctionError(SettingsError):
    """The train function cannot be imported by another process."""


class TrainerError(SettingsError):
    """Model, loss, data or optimizer cannot be trained as given."""


class NotInJob(ElasticError, RuntimeError):
    """The call is allowed only in a worker of a running job."""


class LayoutError(ElasticError):
    """A layout breaks an invariant."""


class CoverageLost(LayoutError):
    """No live worker holds a needed run of state.

    `known`: the last step of which any state is known; -1 if no step has been applied.
    """

    exit_code = 75

    def __init__(self, message: str, *, known: int | None = None) -> None:
        super().__init__(message)
        self.known = known


class NothingSaved(CoverageLost):
    """No live worker holds a needed run of state, and no checkpoint has been saved yet."""


class CopiesConflict(ElasticError):
    """Survivors hold different copies of what must be equal."""


class StateUnproven(CopiesConflict):
    """Copies of the state differ, no check shows which of them is right, and no older state that was equal is in memory.

    `back` is the newest step as of which they did not differ.
    """

    def __init__(self, message: str, *, back: int | None = None) -> None:
        super().__init__(message)
        self.back = back


class MemoryDamaged(ElasticError):
    """Memory changed while nothing wrote to it, or copies that must be equal differ: wrong copies are discarded.

    `findings` say what is wrong, as JSON of `elastic.observe.finding.Finding`.
    """

    def __init__(self, message: str, findings: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.findings = list(findings)


class GateRefused(ElasticError):
    """A migration must not commit; `check` is the name of the check that failed."""

    def __init__(self, message: str, *, check: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check


class LinkError(ElasticError, ConnectionError):
    """A link could not be made, or broke its protocol."""

    surely_not_done = False

    def __init__(self, message: str, *, peer: int | None = None) -> None:
        super().__init__(message)
        self.peer = peer


class PeerLost(LinkError):
    """The process at the other end of a link is gone."""


class Interrupted(ElasticError):
    """A wait was cancelled."""


class EtcdUnavailable(ElasticError, ConnectionError):
    """etcd cannot be started, reached or logged in to."""

    surely_not_done = False
    exit_code = 75


class EtcdMissing(EtcdUnavailable):
    """No private etcd can be started here; a retry does not help."""

    surely_not_done = True
    exit_code = 2


class EtcdFull(EtcdUnavailable):
    """etcd answers, but has no space left to write."""

    surely_not_done = True


class EtcdRefused(EtcdUnavailable):
    """etcd answers, and refuses permanently: a retry does not help."""

    surely_not_done = True
    exit_code = 2


class Conflict(ElasticError):
    """A compare-and-swap lost: another client wrote first; nothing was written."""


class Deposed(Conflict):
    """Another agent coordinates the job; nothing was written."""


class MismatchError(ElasticError):
    """Workers disagree on something that must be equal on all of them."""


class HostRefused(MismatchError):
    """This host's settings, code or versions are not those of the job."""

    exit_code = 2


class HostUnfit(ElasticError):
    """This host failed its check before it joined a job."""

    exit_code = 3


class CheckpointError(ElasticError):
    """A checkpoint cannot be read, written or mapped; nothing was loaded, and no good checkpoint is damaged."""


class CheckpointDamaged(CheckpointError):
    """The contents of a checkpoint cannot be read, or are not what was written."""


class NonFinite(ElasticError, ArithmeticError):
    """A loss or a gradient became NaN or infinite."""


class PowerError(ElasticError):
    """A GPU's clocks or power cannot be read or set; `condition` is a value of `elastic.power.conditions.Condition`."""

    def __init__(self, message: str, *, condition: str = "unknown") -> None:
        super().__init__(message)
        self.condition = condition


class JobFailed(ElasticError, RuntimeError):
    """The job ended with an error of one of its workers."""

    surely_not_done = False


class HostLost(JobFailed):
    """This host, or its agent, is lost to a job that did not fail itself, or other hosts are with the job's state."""

    exit_code = 75


class NameLost(JobFailed):
    """Another job has taken this job's name at etcd."""


class Terminated(SystemExit):
    """SIGTERM or SIGHUP ends this program, and the job has stopped. `code` is the shell's exit code for the signal: 143 or 129.

    `result` is the `JobResult` of a job that stopped at a step boundary; None if a second signal stopped it at once.
    """

    def __init__(self, code: int, result: Any = None) -> None:
        super().__init__(code)
        self.result = result
