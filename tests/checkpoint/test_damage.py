"""Tests damaged, hostile and future files: a load is correct, or refused with file and reason; nothing is deleted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint.commit import save
from elastic.checkpoint.directory import found, newest
from elastic.checkpoint.files import read_header
from elastic.checkpoint.manifest import MANIFEST, OtherVersion
from elastic.checkpoint.plan import INDEX
from elastic.checkpoint.reader import ElasticSource
from elastic.checkpoint.store import LocalStore
from elastic.checkpoint.strict_json import loads
from elastic.errors import CheckpointError
from tests.checkpoint.format_samples import contents_of, equals, values_at, whole_runs

SHAPES = {"a": (70, 1000), "b": (65,), "c": ()}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 11 and 12."""
    root = tmp_path_factory.mktemp("damage")
    for step in (11, 12):
        values = values_at(step, SHAPES)
        save(LocalStore(root), contents_of(values), whole_runs(values), step=step, max_file_bytes=150_000)
    return root


@pytest.fixture
def copy(both: Path, tmp_path: Path) -> Path:
    shutil.copytree(both, tmp_path / "copy")
    return tmp_path / "copy"


def loaded(root: Path, *, verify: bool = True) -> int:
    source = newest(LocalStore(root), verify=verify)
    assert source is not None
    step = source.manifest.step
    assert equals(source, values_at(step, SHAPES))
    source.close()
    return step


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "step-00000012").iterdir())


def test_a_flipped_bit_anywhere_is_found(both: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(both, root)
    store = LocalStore(root)
    for name in names(root):
        path = root / "step-00000012" / name
        good = path.read_bytes()
        for place in sorted({*range(0, len(good), max(1, len(good) // 8)), *range(0, min(90, len(good)), 3), len(good) - 1}):
            bad = bytearray(good)
            bad[place] ^= 1 << place % 8
            path.write_bytes(bad)
            with pytest.raises(CheckpointError, match=name):
                ElasticSource(store, "step-00000012").verify()
        assert loaded(root) == 11
        path.write_bytes(good)
    assert loaded(root) == 12


def test_a_read_of_a_damaged_block_is_refused_and_others_are_not(copy: Path) -> None:
    path = next((copy / "step-00000012").glob("model-00001-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    source = newest(LocalStore(copy))
    assert source is not None
    assert source.manifest.step == 12
    source.read("a", "param", 0, 60_000)
    with pytest.raises(CheckpointError, match=f"{path.name}: damaged: bytes from 262144 on"):
        source.read("a", "param", 60_000, 70_000)


def test_truncation_of_any_file(copy: Path) -> None:
    for name in names(copy):
        path = copy / "step-00000012" / name
        good = path.read_bytes()
        for size in (0, 1, 8, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:size])
            assert loaded(copy, verify=False) == 11
        path.write_bytes(good + b"\0")
        assert loaded(copy, verify=False) == 11
        path.unlink()
        assert loaded(copy, verify=False) == 11
        path.write_bytes(good)
    assert loaded(copy) == 12


def test_two_files_of_a_checkpoint_exchanged(copy: Path) -> None:
    first, second = sorted((copy / "step-00000012").glob("optimizer-0000[12]-*"))
    a, b = first.read_bytes(), second.read_bytes()
    assert len(a) == len(b)
    first.write_bytes(b)
    second.write_bytes(a)
    assert loaded(copy) == 11


def test_when_none_is_good_all_reasons_are_given(copy: Path) -> None:
    for step in (11, 12):
        (copy / f"step-000000{step}" / MANIFEST).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"no good checkpoint among 2: .*12/manifest.json.*11/manifest.json"):
        newest(LocalStore(copy))
    assert len(list(copy.glob("step-*/model-00001-*"))) == 2


def test_an_empty_directory_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest(LocalStore(tmp_path)) is None
    assert newest(LocalStore(tmp_path / "missing")) is None


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Somebody who knows the format changes a manifest and signs it."""
    body = json.loads(path.read_bytes())
    del body["sha256"]
    changed = change(body)
    text = changed if isinstance(changed, bytes) else json.dumps(body).encode()[1:]
    path.write_bytes(b'{"sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'",\n' + text)


@pytest.mark.parametrize(("version", "advice"), [(4, "update this"), (2, "read it with the program that wrote it"), (-1, "read it with")])
def test_another_version_is_refused_and_not_passed_over(copy: Path, version: int, advice: str) -> None:
    rewrite(copy / "step-00000012" / MANIFEST, lambda body: body.update(version=version))
    with pytest.raises(OtherVersion, match=rf"12/manifest.json: it has format version {version}, and this program reads 3: {advice}"):
        newest(LocalStore(copy))


def _put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: Any) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return change


def _move(file: str) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body["files"][file] = body["files"].pop(INDEX)

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_put("format", value="other"), "not a manifest of"),
        (_put("version", value="1"), "not a manifest of"),
        (lambda body: body.pop("groups"), "these entries are missing: groups"),
        (_put("step", value=-1), "-1 is not a count"),
        (_put("step", value=True), "True is not a count"),
        (_put("step", value=13), "its manifest is of step 13, its name of step 12"),
        (_put("tensors", "a", "param", "offset", value=-8), "-8 is not a count"),
        (_put("tensors", "a", "param", "offset", value=1 << 40), "'a', 'param' lies outside of its file"),
        (_put("tensors", "a", "param", "shape", value=[1 << 62, 1 << 62]), "outside of its file"),
        (_put("tensors", "a", "param", "shape", value=7), "malformed"),
        (_put("tensors", "a", "param", "dtype", value="object"), "unknown dtype 'object'"),
        (_put("tensors", "a", "param", "file", value="../../etc/passwd"), "outside of its file"),
        (_put("tensors", value=[]), "malformed"),
        (_put("files", INDEX, "blocks", value=""), "digests of model.safetensors.index.json contradict each other"),
        (_put("files", INDEX, "size", value=1 << 62), "contradict each other"),
        (_put("groups", 0, "names", value="ab"), "a list of names"),
        (_move("../escape"), "'../escape' cannot be the name"),
        (_move("/etc/passwd"), "'/etc/passwd' cannot be the name"),
        (_move(".."), "'..' cannot be the name"),
        (_move("a\0b"), "cannot be the name"),
        (_move(MANIFEST), "cannot be the name"),
        (lambda _body: b'"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
        (lambda _body: b'"a":1,"a":2}', "the key 'a' occurs twice"),
        (lambda _body: b'"a":NaN}', "NaN is not JSON"),
        (lambda _body: b'"a":1e999}', "too large for a number"),
        (lambda _body: b'"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (lambda _body: b'"a":"\xff"}', "not valid JSON"),
        (lambda _body: b"", "not valid JSON"),
    ],
)
def test_hostile_manifests_are_refused(copy: Path, change: Callable[[dict[str, Any]], Any], match: str) -> None:
    rewrite(copy / "step-00000012" / MANIFEST, change)
    entry = next(found(LocalStore(copy)))
    assert entry.source is None
    assert re.search(r"step-00000012(/manifest.json)?: .*" + match, str(entry.error))
    assert loaded(copy) == 11


def test_too_many_items_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(CheckpointError, match="bomb: more than 16000000 items"):
        loads(b"[" + b"[]," * 9_000_000 + b"[]]", "bomb")


def test_a_pipe_instead_of_a_file_does_not_hang(copy: Path) -> None:
    path = copy / "step-00000012" / MANIFEST
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"manifest.json: not a regular file"):
        ElasticSource(LocalStore(copy), "step-00000012")


def header_of(data: bytes):
    return read_header(lambda offset, size: data[offset : offset + size], len(data), "x.safetensors")


def file_with(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(start: Any, stop: Any, shape: Any = (4,), dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "too few"),
        (file_with({}, length=1 << 63), "claims 9223372036854775808 bytes"),
        (file_with({}, length=3), "claims 3 bytes"),
        (file_with({}, length=0), "claims 0 bytes"),
        (file_with(b"[]"), "not a JSON object"),
        (file_with(b"  {}"), "not a JSON object"),
        (file_with(b'{"a":1}'), "must have dtype"),
        (file_with(b'{"a":NaN}'), "NaN"),
        (file_with(b'{"a":{},"a":{}}'), "occurs twice"),
        (file_with(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "not valid JSON"),
        (file_with({"__metadata__": {"a": 1}}), "table of strings"),
        (file_with({"a": tensor(0, 4, dtype="X9")}, bytes(4)), "unknown dtype 'X9'"),
        (file_with({"a": tensor(0, 4, dtype=["U8"])}, bytes(4)), "unknown dtype"),
        (file_with({"a": tensor(-4, 0)}), "impossible offsets"),
        (file_with({"a": tensor(0, 4.0)}, bytes(4)), "impossible offsets"),
        (file_with({"a": tensor(False, 4)}, bytes(4)), "impossible offsets"),
        (file_with({"a": tensor(0, 4, (-2, -2))}, bytes(4)), "impossible shape"),
        (file_with({"a": tensor(0, 4, "4")}, bytes(4)), "impossible shape"),
        (file_with({"a": tensor(0, 4, (1 << 62, 1 << 62))}, bytes(4)), "cannot have bytes"),
        (file_with({"a": tensor(0, 4, (5,))}, bytes(4)), "cannot have bytes"),
        (file_with({"a": tensor(0, 4), "b": tensor(2, 6)}, bytes(6)), "'b' overlaps"),
        (file_with({"a": tensor(0, 4), "b": tensor(5, 9)}, bytes(9)), "'b' leaves a gap"),
        (file_with({"a": tensor(4, 8)}, bytes(8)), "'a' leaves a gap"),
        (file_with({"a": tensor(0, 4)}, bytes(3)), "describes .* bytes"),
        (file_with({"a": tensor(0, 4)}, bytes(5)), "describes .* bytes"),
    ],
)
def test_hostile_safetensors_headers_are_refused(data: bytes, match: str) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .*" + match):
        header_of(data)


@given(st.binary(max_size=200), st.data())
@settings(max_examples=200, deadline=None)
def test_headers_are_read_or_refused(noise: bytes, data: st.DataObject) -> None:
    good = file_with({"a": tensor(0, 4), "b": tensor(4, 12, (2,), "F32")}, bytes(12))
    assert [entry.name for entry in header_of(good).entries] == ["a", "b"]
    place = data.draw(st.integers(0, len(good)))
    try:
        header = header_of(good[:place] + noise + good[place + data.draw(st.integers(0, 20)) :])
    except CheckpointError:
        return
    assert header.entries == () or header.entries[0].start == 0
