"""The launcher's request to an agent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from elastic.host.channel import Message
from elastic.settings import SEGMENTS, JobSettings, default_environment, job_mark, worker_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How this host shares a job with others: the job's `secret` (hexadecimal), the IP address `interface` at which others reach it, the
    number of hosts `least` with which the job is founded, and the settings that were `given` here and must be the founder's. `rack` is
    where it stands, None if nobody said. With `tls`, links with other hosts are encrypted, with the fields of `Credentials` in
    `credentials`, or with the job's own certificate."""

    secret: str
    interface: str
    least: int = 1
    given: dict[str, Any] = field(default_factory=dict)
    rack: str | None = None
    tls: bool = False
    credentials: dict[str, str] | None = field(default=None, repr=False)

    def credentials_for_tls(self) -> dict[str, str] | None:
        """Returns the fields of `Credentials` of links with other hosts, None if they are not encrypted."""
        if self.credentials is not None or not self.tls:
            return self.credentials
        from elastic.comm.job_certificate import job_credentials  # takes long, and few jobs need it

        return job_credentials(bytes.fromhex(self.secret)).to_json()


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The request to run a job, or to take part in it if it is shared. `environment`, `import_path`, `argv` and `modules` are the
    launcher's own. `incarnation` is the one of the job in which an earlier agent of this launcher trained: only that one is joined. At
    `drain_on`, in the form of `host.notices.notice_source`, a notice of termination may appear. `watches`: the launcher wants to be told
    what happens (`agent.record`), and shows a progress `bar`; workers record `traces`."""

    settings: JobSettings
    directory: str
    environment: dict[str, str]
    import_path: tuple[str, ...]
    argv: tuple[str, ...]
    modules: dict[str, str]
    sharing: Sharing | None = None
    incarnation: str | None = None
    drain_on: str | None = None
    watches: bool = False
    bar: bool = False
    traces: bool = False

    @classmethod
    def from_json(cls, data: Message) -> Start:
        return cls(
            settings=JobSettings.from_json(data["settings"]),
            directory=data["directory"],
            environment=data["environment"],
            import_path=tuple(data["import_path"]),
            argv=tuple(data["argv"]),
            modules=data["modules"],
            sharing=None if data.get("sharing") is None else Sharing(**data["sharing"]),
            incarnation=data.get("incarnation"),
            drain_on=data.get("drain_on"),
            watches=data.get("watches", False),
            bar=data.get("bar", False),
            traces=data.get("traces", False),
        )

    @property
    def segments(self) -> bool:
        """Whether the workers' state lies in segments, which outlive their processes."""
        return self.environment.get(SEGMENTS) != "0"

    @property
    def worker_environment(self) -> dict[str, str]:
        """The environment of every worker."""
        fixed = worker_environment(self.settings.threads, self.settings.isa)
        return {**default_environment(self.directory), **self.environment, **fixed, **dict([job_mark(self.directory)])}
