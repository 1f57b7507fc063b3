"""Tests checkpoints in S3, with the real client (s3fs) over HTTP and moto's server."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import elastic
from elastic.checkpoint.cli import app
from elastic.checkpoint.commit import begin, save, write_runs
from elastic.checkpoint.directory import collect, found, newest, temporary
from elastic.checkpoint.objects import ObjectStore, open_store
from elastic.checkpoint.plan import plan_files
from elastic.checkpoint.retention import KeepLast, retire
from elastic.checkpoint.state import PARAM, Contents, Spec
from elastic.errors import ElasticError
from tests.checkpoint import saved_trainings
from tests.checkpoint.format_samples import contents_of, equals, values_at, whole_runs

pytest.importorskip("s3fs", reason="s3fs is not installed")
moto = pytest.importorskip("moto.server", reason="moto is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # deprecation warnings of client and server are not ours
SMALL = {"a": (300, 301), "b": (65,)}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Its URL."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_DEFAULT_REGION", "us-east-1")):
            patch.setenv(name, value)
        ObjectStore("s3://bucket/")._fs.mkdir("bucket")
        yield "s3://bucket"
    server.stop()


def every_object(url: str) -> list[str]:
    filesystem = ObjectStore(url)._fs
    filesystem.invalidate_cache()
    return sorted(filesystem.find(url.removeprefix("s3://")))


def test_what_is_saved_is_found_kept_and_removed(bucket: str) -> None:
    url = f"{bucket}/{os.urandom(4).hex()}"
    store = open_store(url)
    names = [
        save(store, contents_of(values_at(step)), whole_runs(values_at(step)), step=step, max_file_bytes=200_000) for step in (1, 2, 3)
    ]
    assert [entry.name for entry in found(store)] == names[::-1]
    retire(store, [KeepLast(1)])
    source = newest(store, verify=True)
    assert source is not None
    assert equals(source, values_at(3))
    ours = {f"{url.removeprefix('s3://')}/{name}" for name in ("latest", *(f"{names[2]}/{file}" for file in source.manifest.files))}
    assert set(every_object(url)) == {*ours, f"{url.removeprefix('s3://')}/{names[2]}/manifest.json"}


def test_a_dead_save_is_no_checkpoint_and_is_collected(bucket: str) -> None:
    url = f"{bucket}/{os.urandom(4).hex()}"
    store = open_store(url)
    values = values_at(4, SMALL)
    plan = plan_files(contents_of(values))
    ticket = begin(store, plan, step=4)
    write_runs(plan, store, ticket, whole_runs(values)[:2])
    assert newest(store) is None
    assert temporary(store) == [ticket.directory]
    assert collect(store, older_than_s=3600, now=time.time()) == []
    assert collect(store, older_than_s=0, now=time.time() + 60) == [ticket.directory]
    assert every_object(url) == []


def test_parts_that_are_uploaded_in_pieces(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 takes large objects in several requests, and s3fs has another code path for them."""
    store = ObjectStore(f"{bucket}/{os.urandom(4).hex()}")
    uploads = []
    upload = type(store._fs).call_s3

    def counted(self: Any, method: str, *arguments: Any, **named: Any) -> Any:
        uploads.append(method)
        return upload(self, method, *arguments, **named)

    monkeypatch.setattr(store._fs, "default_block_size", 5 << 20)
    monkeypatch.setattr(type(store._fs), "call_s3", counted)
    values = {("w", PARAM): torch.randn(1700, 1701)}
    contents = Contents(tensors={"w": {PARAM: Spec(shape=(1700, 1701), dtype="float32")}})
    save(store, contents, whole_runs(values), step=1)
    assert uploads.count("upload_part") > 2
    source = newest(store, verify=True)
    assert source is not None
    assert torch.equal(source.read("w", PARAM, 5, 1700 * 1701), values["w", PARAM].view(-1)[5:])
    assert source.bytes_read <= 2 * values["w", PARAM].nbytes + (1 << 20), "ranges are read, and nothing else"


@pytest.mark.usefixtures("leftovers")
def test_a_job_goes_on_from_what_another_one_saved_there(bucket: str, tmp_path: Any) -> None:
    url = f"{bucket}/{os.urandom(4).hex()}"

    def run(where: str, steps: int, every: int | None, plain: bool = False, **layout: Any) -> Any:
        return elastic.run(saved_trainings.train, args=[where, every, steps, plain, 2, 0.05], rebalance=False, **layout).value

    whole = run(str(tmp_path), 9, None, plain=True, workers=2, stages=1)
    before = run(url, 5, 2, workers=3, stages=2)
    after = run(url, 9, None, workers=2, stages=1)
    assert before["losses"] + after["losses"] == whole["losses"]
    assert after["digest"] == whole["digest"]
    entries = list(found(open_store(url)))
    assert [entry.step for entry in entries][:1] == [9]
    assert not [path for path in every_object(url) if "/.part-" in path or path.endswith("/.token")]
    result = CliRunner().invoke(app, ["verify", f"{url}/{entries[0].name}"])
    assert result.exit_code == 0, result.output


def test_a_bucket_is_not_made(bucket: str) -> None:
    store = open_store("s3://no-such-bucket/run")
    for use in (
        lambda: save(store, contents_of(values_at(1, SMALL)), whole_runs(values_at(1, SMALL)), step=1),
        lambda: newest(store),
        lambda: elastic.run(saved_trainings.train, args=["s3://no-such-bucket/run", None, 5, False, None, 0.0], workers=1),
    ):
        with pytest.raises(ElasticError, match=r"s3://no-such-bucket/run: there is no 'no-such-bucket': create it"):
            use()
    assert newest(open_store(f"{bucket}/nothing/yet")) is None
