"""The settings of a job, and the only reader of the process environment.

Variables that change the bits of results are fixed in the environment of the fork server before its exec: libraries read them on load.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from elastic.errors import SettingsError

VERSION = "0.1.0"
AVX512_FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_ISA_VARIABLES = {
    "avx512": {"MKL_CBWR": "AVX512,STRICT", "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"MKL_CBWR": "AVX2,STRICT", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "default": {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "DEFAULT"},
}
_FIXED_VARIABLES = {
    "PYTHONHASHSEED": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "OPENBLAS_NUM_THREADS": "1",  # numpy's OpenBLAS would start its threads on import, before the fork server forks
    "MALLOC_ARENA_MAX": "4",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # only a request: glibc before 2.35 ignores it
_AGENT_VARIABLES = {
    "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",  # etcd3's generated code needs it
    "GRPC_VERBOSITY": "NONE",
}
_NOT_FOR_THE_AGENT = ("PYTHONWARNINGS",)  # etcd3 and protobuf emit deprecation warnings
_NEEDED_BY_ETCD = ("ETCD_UNSUPPORTED_ARCH",)
SEGMENTS = "ELASTIC_SEGMENTS"
"""With the value 0, state is ordinary memory of the workers, which keep copies of each other's state, also within a host."""

RACK = "ELASTIC_RACK"
"""The rack in which this host stands, where `rack=` does not say it."""

MOST_COPIES = 16

_UNITS = {"b": 1} | {f"{prefix}{end}": base**power for power, prefix in enumerate("kmgt", 1) for end, base in (("b", 1000), ("ib", 1024))}
_BYTES = re.compile(rf"(\d+(?:\.\d+)?) *({'|'.join(_UNITS)})?", re.IGNORECASE)
DVFS = ("off", "speed", "energy")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """The settings of one job. Times are in seconds.

    `train_fn` is `module:qualified.name`, `path.py:qualified.name` or `path.py:__main__`; `args` are JSON values; `etcd` is None for a
    private etcd, else `[user[:password]@]host:port[,host:port...]`, and `etcd_files` has the fields of `EtcdEndpoint` that name files.
    Below `min_workers` the job pauses; `respawn` starts a new worker for each that dies, `spares` more wait on this host to replace one at
    once, `rebalance` shifts work from workers that are steadily slower. `memory` limits the bytes of one worker; None is its share of the
    host's memory. A worker whose process is stopped for `stopped_after` is replaced, and one for which the others wait and that makes no
    progress for `hung_after` or longer (`elastic/health/limits.py`); None: it is waited for. `copies` is how many copies of the state there
    are in all, each on another host. `plan` is the saved plan to begin with, in the
    form of `SavedPlan.to_json`; with `plans_only` the job ends with its first plan and trains nothing. `dvfs` says what GPU clocks are
    chosen for, one of DVFS. `device` is the kind of device that workers compute on, as torch names it, or "auto"; `workers_per_device`
    share one. `directory` is the run directory, kept when the job ends; None makes a temporary one. With `shared`, `workers` are those of
    this host, and other hosts take part. `grace_s` bounds how long a finished worker waits for the others to finish, and how long all may
    take to exit. Raises SettingsError.
    """

    name: str
    workers: int
    train_fn: str
    isa: str
    args: tuple[Any, ...] = ()
    stages: int | None = None
    min_workers: int = 1
    etcd: str | None = None
    etcd_files: dict[str, str] = dataclasses.field(default_factory=dict)
    threads: int = 1
    seed: int = 0
    exact: bool = True
    respawn: bool = True
    spares: int = 0
    copies: int = 2
    rebalance: bool = True
    memory: int | None = None
    stopped_after: float | None = 1.0
    hung_after: float | None = 3.0
    plan: dict[str, Any] | None = None
    plans_only: bool = False
    dvfs: str = "off"
    device: str = "cpu"
    workers_per_device: int = 1
    directory: str | None = None
    shared: bool = False
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise SettingsError(f"name={self.name!r}: use 1 to 64 letters, digits, dots, dashes and underscores")
        for field in ("workers", "threads", "min_workers", "workers_per_device"):
            _check_count(field, getattr(self, field))
        if self.min_workers > self.workers and not self.shared:
            raise SettingsError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        if self.stages is not None:
            _check_count("stages", self.stages)
            if self.stages > self.workers and not self.shared:
                raise SettingsError(f"stages={self.stages} needs at least {self.stages} workers, and workers={self.workers}")
        if self.memory is not None:
            _check_count("memory", self.memory)
        if not isinstance(self.spares, int) or isinstance(self.spares, bool) or self.spares < 0:
            raise SettingsError(f"spares={self.spares!r}: use a whole number of at least 0")
        if self.spares and not self.respawn:
            raise SettingsError(f"spares={self.spares} are new workers, which respawn=False forbids: leave one of the two out")
        if not isinstance(self.copies, int) or isinstance(self.copies, bool) or not 1 <= self.copies <= MOST_COPIES:
            raise SettingsError(
                f"copies={self.copies!r}: use a whole number from 1 (the state itself, and no further copy) to {MOST_COPIES}. Each copy is "
                "on another host, and takes memory there"
            )
        for field, what in (("stopped_after", "stopped"), ("hung_after", "hung")):
            value = getattr(self, field)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise SettingsError(f"{field}={value!r}: use seconds above 0, or None to wait for a {what} worker")
        if self.isa not in _ISA_VARIABLES:
            raise SettingsError(f"isa={self.isa!r}: use one of {', '.join(_ISA_VARIABLES)}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 1 << 64:
            raise SettingsError(f"seed={self.seed!r}: use an integer from 0 to 2**64 - 1")
        if self.dvfs not in DVFS:
            raise SettingsError(f"dvfs={self.dvfs!r}: use one of {', '.join(DVFS)}")
        if self.dvfs != "off" and self.shared:
            raise SettingsError(f"dvfs={self.dvfs!r} is for jobs on one host: leave it out, or secret=")
        if not (isinstance(self.device, str) and self.device.isidentifier()):
            raise SettingsError(
                f'device={self.device!r}: use "auto", "cpu", "cuda" or another kind of device that torch knows, without an index: each '
                "worker gets a device of its own. CUDA_VISIBLE_DEVICES says which GPUs there are"
            )
        _check_args(self.args)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def record(self) -> dict[str, Any]:
        """Returns what etcd stores: without `etcd`, which may hold a password; `args`, which may be large, as the SHA-256 of its JSON."""
        kept = {name: value for name, value in self.to_json().items() if name not in ("etcd", "etcd_files", "args")}
        return {**kept, "args_sha256": hashlib.sha256(json.dumps(self.args).encode()).hexdigest()}

    def for_others(self) -> dict[str, Any]:
        """Returns what other hosts get: without this host's way to etcd, which may hold a password, its directory and its plan."""
        return {**self.to_json(), "etcd": None, "etcd_files": {}, "plan": None, "directory": None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> JobSettings:
        return cls(**{**data, "args": tuple(data["args"])})


def _check_count(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingsError(f"{field}={value!r}: use a whole number of at least 1")


def byte_count(value: int | str) -> int:
    """Returns the bytes of a number, or of a text such as `2GiB`, `1.5 GB` or `512MiB`. Raises SettingsError."""
    found = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is not None:
        return round(float(found[1]) * _UNITS[(found[2] or "B").lower()])
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise SettingsError(f"memory={value!r}: use a number of bytes, or one with a unit such as '2GiB' or '500MB'")


def _check_args(args: tuple[Any, ...]) -> None:
    for place, value in enumerate(args):
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise SettingsError(
                f"args[{place}] is a {type(value).__name__} that cannot be sent to the workers as JSON ({error}); "
                "pass numbers, strings, lists and dicts, and build the rest inside train_fn"
            ) from error


def detect_isa(cpuinfo: str, machine: str) -> str:
    """Returns the widest instruction set that the fixed kernels may use, from the text of /proc/cpuinfo."""
    if machine not in ("x86_64", "AMD64"):
        return "default"
    line = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    if flags >= AVX512_FLAGS:
        return "avx512"
    return "avx2" if "avx2" in flags else "default"


@functools.cache
def best_isa() -> str:
    """The `isa` of this machine's processor."""
    source = Path("/proc/cpuinfo")
    return detect_isa(source.read_text() if source.exists() else "", os.uname().machine)


def isa_includes(wider: str, narrower: str) -> bool:
    """Returns whether a processor with the instruction set `wider` can run kernels of `narrower`."""
    order = ("default", "avx2", "avx512")
    return order.index(wider) >= order.index(narrower)


def worker_environment(threads: int, isa: str) -> dict[str, str]:
    """The variables that fix bits (and the allocator) in the training processes."""
    counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {**counts, **_ISA_VARIABLES[isa], **_FIXED_VARIABLES}


def default_environment(directory: str) -> dict[str, str]:
    """Defaults that the user's own variables override: torch's caches, which it makes on import, in the job's directory; huge pages.

    With huge pages a killed process of 320 MB exits, and its links break, after 4 ms instead of 20; fresh memory costs half.
    """
    return {"TORCHINDUCTOR_CACHE_DIR": f"{directory}/torchinductor", **HUGE_PAGES}


def job_mark(directory: str) -> tuple[str, str]:
    """The variable and its value that mark processes started by `train_fn`: ended with the job, unless they unset the variable."""
    return "ELASTIC_JOB", directory


def own_environment() -> dict[str, str]:
    """A copy of this process's environment, without what a launcher says of its rank: workers have none."""
    ranked = launched_rank() is not None
    return {name: value for name, value in os.environ.items() if not (ranked and (name in _OF_A_RANK or name.startswith("TORCHELASTIC_")))}


def agent_environment() -> dict[str, str]:
    """This process's environment, adapted for an agent. Workers get the unchanged one: their packages may need another protobuf."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_THE_AGENT}
    return {**kept, **_AGENT_VARIABLES}


_OF_A_RANK = {
    *(
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
        "ROLE_NAME",
    ),
    *("MASTER_ADDR", "MASTER_PORT"),
}
_MEETING = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedRank:
    """This process as torchrun, or a launcher like it, has started it: its rank of `world`, of which `on_host` are on this host, and the
    `local` one of these. `meeting` is a text that all of them have, and no others."""

    rank: int
    world: int
    on_host: int
    local: int
    meeting: str


def launched_rank() -> LaunchedRank | None:
    """Returns what a launcher of ranks says of this process; None if none has started it."""
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not all(text.isdecimal() for text in found):
        return None
    rank, world, local = map(int, found)
    on_host = os.environ.get("LOCAL_WORLD_SIZE", "")
    meeting = " ".join(os.environ.get(name, "") for name in _MEETING)
    return LaunchedRank(rank=rank, world=world, on_host=int(on_host) if on_host.isdecimal() else world, local=local, meeting=meeting)


@contextmanager
def python_protobuf() -> Iterator[None]:
    """While etcd3 is imported in a process that is no agent. Processes that this one starts get the environment unchanged."""
    name = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
    before = os.environ.get(name)
    os.environ[name] = _AGENT_VARIABLES[name]
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def clocks_directory() -> Path:
    """The directory in which all jobs of this user record the clocks that they have set on this host; it does not survive a reboot."""
    if given := os.environ.get("ELASTIC_CLOCKS"):
        return Path(given)
    if os.getuid() == 0:
        return Path("/run/elastic-clocks")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "elastic-clocks") if runtime else Path(f"/tmp/elastic-clocks-{os.getuid()}")


def power_socket() -> Path:
    """The socket of the power daemon."""
    return Path(os.environ.get("ELASTIC_POWER_SOCKET", "/run/elastic-power.sock"))


def visible_gpus() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES (indices, or UUIDs of GPUs and MIG devices); None if it is not set: all GPUs are visible."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if given is None else [entry.strip() for entry in given.split(",") if entry.strip()]


def see_only(gpu: str) -> None:
    """Makes one GPU the only one that CUDA shows to this process; called before CUDA is initialised."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def etcd_environment() -> dict[str, str]:
    """This process's environment without variables that would override the flags of a private etcd or make it print traces."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_") or name in _NEEDED_BY_ETCD}
    return {**kept, "GOTRACEBACK": "none"}


def fingerprint(device: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Returns what the bits of this training process depend on; it must be equal on all workers. Imports torch. `device` describes the
    device that it computes on."""
    import torch

    names = [*worker_environment(1, "default")]
    numeric = {name: os.environ.get(name, "") for name in names if not name.startswith("MALLOC_")}
    return {
        "torch": str(torch.__version__),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "machine": os.uname().machine,
        "capability": torch.backends.cpu.get_cpu_capability(),
        **numeric,
        **device,
    }
