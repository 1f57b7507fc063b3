"""Evidence about one worker at one moment: its process, its activity, and what it has used so far. Plain values, from its host."""

from __future__ import annotations

from dataclasses import dataclass

from elastic.observe.activity import CHECKPOINT, NOBODY, TRAIN_FN, Doing, Standing

_FROZEN = ("do_freezer_trap", "__refrigerator", "refrigerator")  # where the kernel keeps processes of a frozen control group


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a process has used since it began.

    `ran_s` and `delayed_s` are of its training thread: on a processor, and runnable without one. `cpu_s` is the processor time of all
    threads and descendants, `io_bytes` what the process read and wrote. `running`: some thread or descendant runs or is runnable. `wakes`
    counts how often its threads began to run. `wchan` is the kernel function that the training thread sleeps in.
    """

    ran_s: float
    delayed_s: float
    cpu_s: float
    io_bytes: int = 0
    running: bool = False
    wakes: int = 0
    wchan: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """One observation of a worker, made by its host at `seen_at` of that host's clock.

    `moment` is a text that changes whenever the worker makes progress. Clocks of different hosts are never compared: of `seen_at`, only
    differences count.

    `state` is the letter in /proc/PID/stat, empty if unknown. `doing` and `standing` are None without a record; `age_s` is how long ago its
    activity began. `mute_s` is how long ago a thread that runs every second has run in it. `usage` is None if the activity is recent.
    `code` is the user's line that it is in, if it has reported one. `held` is the share, 0 to 1, of about the last second in which a quota
    of its control group kept its training thread from running.
    """

    worker: int
    pid: int | None
    seen_at: float = 0.0
    moment: str = ""
    state: str = ""
    doing: Doing | None = None
    standing: Standing | None = None
    age_s: float = 0.0
    mute_s: float = 0.0
    usage: Usage | None = None
    code: str = ""
    held: float = 0.0

    @property
    def stopped(self) -> bool:
        """Whether the process is stopped by a signal, by a debugger, or with its control group."""
        return self.state in ("T", "t") or (self.usage is not None and self.usage.wchan in _FROZEN)

    @property
    def waits_for(self) -> int:
        """The worker that it waits for, AGENT, or NOBODY."""
        return NOBODY if self.standing is None else self.standing.waits_for

    @property
    def outside(self) -> bool:
        """Whether it is in code that may wait for long for something outside the job: `train_fn`, a checkpoint, or before it is ready."""
        return self.doing is None or self.standing is None or self.standing.place in (TRAIN_FN, CHECKPOINT)

    @property
    def spot(self) -> tuple[object, ...]:
        """Where in the code it is: equal for workers that do the same."""
        place = None if self.standing is None else self.standing.place
        return place, None if self.doing is None else self.doing.phase, self.code
