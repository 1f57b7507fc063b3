"""Tests the contract of every kind of store, and files assembled from parts if several workers cannot write to one."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint.commit import save
from elastic.checkpoint.directory import collect, found, newest
from elastic.checkpoint.objects import ObjectStore, open_store, part_of
from elastic.checkpoint.retention import KeepLast, retire
from elastic.checkpoint.store import PART, LocalStore, Store, read_all
from elastic.errors import CheckpointError
from tests.checkpoint.format_samples import contents_of, equals, values_at, whole_runs

KINDS = ["directory", "memory", "local objects"]


def memory_url() -> str:
    return f"memory://{uuid.uuid4().hex}/run"


def forget(url: str) -> None:
    fsspec.filesystem("memory").rm(url.removesuffix("/run"), recursive=True)


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    url = memory_url()
    stores: dict[str, Callable[[], Store]] = {
        "directory": lambda: LocalStore(tmp_path / "run"),
        "memory": lambda: ObjectStore(url),
        "local objects": lambda: ObjectStore(f"local://{tmp_path}/run"),
    }
    made = stores[request.param]()
    made.make_directory("a")
    yield made
    if request.param == "memory":
        forget(url)


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def written(store: Store, path: str, *pieces: tuple[int, bytes]) -> None:
    """By one worker."""
    file = store.open_write(path)
    try:
        for offset, data in pieces:
            file.write(array(data), offset)
        file.sync()
    finally:
        file.close()


def test_what_is_put_is_there_once(store: Store) -> None:
    store.put("a/token", b"first")
    assert read_all(store, "a/token", 99) == b"first"
    assert store.size("a/token") == 5
    assert abs(store.changed("a/token") - time.time()) < 60
    with pytest.raises(CheckpointError, match="a/token"):
        store.put("a/token", b"second")
    assert read_all(store, "a/token", 99) == b"first"
    with pytest.raises(CheckpointError, match="it has 5 bytes, above the limit of 4"):
        read_all(store, "a/token", 4)


def test_what_is_replaced_has_the_new_content(store: Store) -> None:
    store.replace("latest", b"1")
    store.replace("latest", b"22")
    assert read_all(store, "latest", 99) == b"22"
    assert store.names("") == ["a", "latest"]


def test_a_directory_is_made_once_and_removed_when_it_is_empty(store: Store) -> None:
    with pytest.raises(CheckpointError, match="a"):
        store.make_directory("a")
    store.put("a/b", b"")
    store.remove_directory("a")
    assert store.names("a") == ["b"]
    store.remove("a/b")
    store.remove("a/b")
    store.remove_directory("a")
    store.remove_directory("a")
    assert store.names("") == []
    assert store.names("nowhere") == []
    store.sync_directory("")


def test_what_is_not_there_has_no_size_and_cannot_be_opened(store: Store) -> None:
    assert store.size("a/none") is None
    assert store.size("a") is None
    with pytest.raises(CheckpointError, match="none"):
        store.open_read("a/none")
    with pytest.raises(CheckpointError, match="none"):
        store.changed("a/none")


def test_a_file_is_what_several_wrote(store: Store) -> None:
    store.create("a/file", 10)
    written(store, "a/file", (8, b"ij"), (0, b"ab"), (2, b"cd"))
    written(store, "a/file", (4, b"efgh"))
    assert store.join("a/file", 10)
    assert store.join("a/file", 10)
    assert store.size("a/file") == 10
    file = store.open_read("a/file")
    assert file.size == 10
    memory = np.zeros(4, dtype=np.uint8)
    file.read_into(memory, 3)
    assert memory.tobytes() == b"defg"
    with pytest.raises(CheckpointError, match="too early"):
        file.read_into(memory, 8)
    file.close()
    assert store.names("a") == ["file"]


def test_an_empty_file_is_a_file(store: Store) -> None:
    store.create("a/empty", 0)
    written(store, "a/empty", (0, b""))
    assert store.join("a/empty", 0)
    assert store.size("a/empty") == 0
    assert read_all(store, "a/empty", 0) == b""


def test_checkpoints_are_saved_loaded_and_retired(store: Store) -> None:
    store.remove_directory("a")
    for step in (1, 2, 3):
        values = values_at(step, {"a": (70, 1000), "b": (9,)})
        name = save(store, contents_of(values), whole_runs(values), step=step, max_file_bytes=200_000)
        assert not [file for file in store.names(name) if file.startswith(".")]
    assert [entry.step for entry in found(store)] == [3, 2, 1]
    assert len(retire(store, [KeepLast(2)])) == 1
    source = newest(store, verify=True)
    assert source is not None
    assert equals(source, values_at(3, {"a": (70, 1000), "b": (9,)}))
    assert [entry.step for entry in found(store)] == [3, 2]
    source.close()


@pytest.fixture
def objects() -> Iterator[ObjectStore]:
    url = memory_url()
    store = ObjectStore(url)
    store.make_directory("a")
    yield store
    forget(url)


def test_a_file_is_not_made_before_all_of_it_is_there(objects: ObjectStore) -> None:
    assert not objects.join("a/file", 6)
    written(objects, "a/file", (0, b"ab"), (4, b"ef"))
    assert not objects.join("a/file", 6)
    cut_off = objects.open_write("a/file")
    cut_off.write(array(b"cd"), 2)
    assert not objects.join("a/file", 6), "what does not say what it holds counts for nothing"
    cut_off.sync()
    written(objects, "a/file2", (0, b"another"))
    assert objects.join("a/file", 6)
    assert read_all(objects, "a/file", 6) == b"abcdef"
    assert [part_of(name) for name in objects.names("a") if name.startswith(PART)] == ["file2"]


def test_bytes_that_two_wrote_are_refused(objects: ObjectStore) -> None:
    written(objects, "a/file", (0, b"abc"))
    written(objects, "a/file", (2, b"cd"))
    with pytest.raises(CheckpointError, match="bytes from 2 to 3 were written twice"):
        objects.join("a/file", 4)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=12), st.randoms())
@settings(max_examples=30, deadline=None)
def test_any_division_gives_the_same_file(division: list[tuple[int, int]], random) -> None:
    store = ObjectStore(memory_url())
    data = os.urandom(sum(size for _, size in division))
    parts: dict[int, list[tuple[int, bytes]]] = {}
    position = 0
    for worker, size in division:
        parts.setdefault(worker, []).append((position, data[position : position + size]))
        position += size
    for pieces in parts.values():
        random.shuffle(pieces)
        assert not store.join("d/file", len(data))
        written(store, "d/file", *pieces)
    assert store.join("d/file", len(data))
    assert read_all(store, "d/file", len(data)) == data
    assert store.names("d") == ["file"]
    store.remove("d/file")


def test_what_an_unfinished_save_left_is_collected(objects: ObjectStore) -> None:
    objects.remove_directory("a")
    directory = "step-00000003-e0-a0-0123456789abcdef"
    objects.make_directory(directory)
    objects.put(f"{directory}/.token", b"0123456789abcdef")
    written(objects, f"{directory}/model-00001-of-00001.safetensors", (0, b"ab"))
    assert collect(objects, older_than_s=3600, now=time.time()) == []
    assert collect(objects, older_than_s=0, now=time.time() + 60) == [directory]
    assert objects.names("") == []
    assert newest(objects) is None


def test_a_url_names_its_store(tmp_path: Path) -> None:
    assert isinstance(open_store(tmp_path), LocalStore)
    local = open_store(f"file://{tmp_path}/run")
    assert isinstance(local, LocalStore)
    assert local.where("x") == f"{tmp_path}/run/x"
    assert open_store("memory://some/run/").where("x") == "memory://some/run/x"
    with pytest.raises(CheckpointError, match=r"nosuch://a: .*; supported are .*memory.*"):
        open_store("nosuch://a")


def test_a_missing_plug_in_is_named() -> None:
    missing = [name for name in ("s3", "gs", "abfs") if not _installed(name)]
    if not missing:
        pytest.skip("all plug-ins are installed")
    with pytest.raises(CheckpointError, match=rf"{missing[0]}://bucket/run: .*[Ii]nstall"):
        open_store(f"{missing[0]}://bucket/run")


def _installed(protocol: str) -> bool:
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        return False
    return True
