"""The exit codes of `elastic agent` and `elastic run`: what has happened, and whether a scheduler should start the command again."""

from __future__ import annotations

TABLE: tuple[tuple[str, str, str], ...] = (
    ("0", "the job is done", "no"),
    ("1", "the job failed by itself (an exception of train_fn, its data, differing workers), or ended while this host was cut off", "no"),
    ("2", "an argument is wrong, or this host's settings, code or versions do not fit the job", "no"),
    ("3", "this host failed its check before it joined: memory, links, processor", "on another host"),
    ("75", "the job did not fail: etcd, the name or other hosts were out of reach, or hosts were lost with their state", "yes"),
    ("130", "stopped on request: Ctrl-C, `elastic stop`, `elastic drain`", "no"),
    (
        "143, 129",
        "SIGTERM (or a notice of --drain-on), SIGHUP: the job has stopped, or goes on without this host",
        "yes, where there is a host",
    ),
)
"""Code, meaning, and whether to start again. `elastic.errors` has the code of each error as `exit_code`."""

EPILOG = "\n\n".join(["Exit codes:", *(f"{code}: {meaning}. Start again: {again}." for code, meaning, again in TABLE)])
"""The table as help text."""
