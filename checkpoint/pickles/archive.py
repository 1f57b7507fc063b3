"""The zip file that `torch.save` makes: a pickle, and one stored (never compressed) member per storage, read by byte range.

Layout, from torch 2.13 `torch/serialization.py` and `caffe2/serialize/inline_container.cc`: all members lie under one folder; `data.pkl` is
the pickle, `data/<key>` the bytes of a storage, `byteorder` says `little` or `big` (absent in old files: little). No file is kept open.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elastic.errors import CheckpointError

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, then (after 22 bytes that the central directory repeats) the lengths of name and extra field."""

_ENCRYPTED = 1
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a file may ask of its reader: bytes of the pickle, its operations, members of the zip file."""

    pickle_bytes: int = 256 << 20
    operations: int = 20_000_000
    members: int = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A stored run of the file: where its local header starts, its length in bytes, and its CRC-32."""

    header: int
    size: int
    crc: int


class Archive:
    """The members of one file by their name without the folder. Raises CheckpointError naming the file and the reason."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.limits = limits
        try:
            self._file_size = path.stat().st_size
            self._members = self._list()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from error
        self._offsets: dict[str, int] = {}
        if "data.pkl" not in self._members:
            raise self.refuse("it holds no data.pkl, so torch.save did not write it")
        if "constants.pkl" in self._members:
            raise self.refuse("it is a TorchScript archive, which is a program, not a checkpoint")
        if "byteorder" in self._members and self.whole("byteorder", 16) != b"little":
            raise self.refuse("its byte order is not little-endian")

    def refuse(self, reason: str) -> CheckpointError:
        """The error to raise."""
        return CheckpointError(f"{self.path}: {reason}")

    def size(self, name: str) -> int:
        """Bytes of a member."""
        if name not in self._members:
            raise self.refuse(f"it has no member {name!r}")
        return self._members[name].size

    def whole(self, name: str, limit: int) -> bytes:
        """All bytes of a member that may have at most `limit`."""
        size = self.size(name)
        if size > limit:
            raise self.refuse(f"member {name!r} has {size} bytes, more than the limit of {limit}")
        buffer = np.empty(size, dtype=np.uint8)
        self.read(name, 0, buffer)
        return buffer.tobytes()

    def read(self, name: str, start: int, buffer: np.ndarray) -> None:
        """Fills `buffer` (bytes) from the member's byte `start` on."""
        if start < 0 or start + buffer.size > self.size(name):
            raise self.refuse(f"bytes {start} to {start + buffer.size} are outside of member {name!r}")
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self.refuse(error.strerror or str(error)) from error
        try:
            self._fill(descriptor, self._offset(descriptor, name) + start, buffer)
        except OSError as error:
            raise self.refuse(error.strerror or str(error)) from error
        finally:
            os.close(descriptor)

    def verify(self) -> None:
        """Reads every member and compares it with its CRC-32."""
        buffer = np.empty(_CHUNK, dtype=np.uint8)
        for name, member in self._members.items():
            crc = 0
            for start in range(0, member.size, _CHUNK):
                part = buffer[: min(_CHUNK, member.size - start)]
                self.read(name, start, part)
                crc = zlib.crc32(part.data, crc)
            if crc != member.crc:
                raise self.refuse(f"member {name!r} is damaged: its CRC-32 is {crc:08x} instead of {member.crc:08x}")

    def _list(self) -> dict[str, Member]:
        try:
            with zipfile.ZipFile(self.path) as file:
                infos = file.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OverflowError) as error:
            legacy = "; files of torch before 1.6 are not zip files and need --trust-pickle" if not self._looks_zipped() else ""
            raise self.refuse(f"it is not a zip file that torch.save wrote ({error}{legacy})") from error
        if len(infos) > self.limits.members:
            raise self.refuse(f"it has {len(infos)} members, more than the limit of {self.limits.members}")
        members: dict[str, Member] = {}
        for info in infos:
            name = info.filename.partition("/")[2]
            self._check(info, name, members)
            members[name] = Member(header=info.header_offset, size=info.file_size, crc=info.CRC)
        return members

    def _check(self, info: zipfile.ZipInfo, name: str, before: dict[str, Member]) -> None:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & _ENCRYPTED:
            raise self.refuse(f"member {info.filename!r} is compressed or encrypted; torch.save stores")
        if name in before or not name:
            raise self.refuse(f"member {info.filename!r} is there twice, or lies in no folder")
        if not 0 <= info.header_offset <= self._file_size or info.file_size > self._file_size:
            raise self.refuse(f"member {info.filename!r} says it has {info.file_size} bytes, the whole file has {self._file_size}")

    def _looks_zipped(self) -> bool:
        with self.path.open("rb") as file:
            return file.read(2) == b"PK"

    def _offset(self, descriptor: int, name: str) -> int:
        if name not in self._offsets:
            member = self._members[name]
            header = os.pread(descriptor, _LOCAL_HEADER.size, member.header)
            if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
                raise self.refuse(f"member {name!r} has no header where the directory says")
            _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
            self._offsets[name] = member.header + _LOCAL_HEADER.size + name_bytes + extra_bytes
        return self._offsets[name]

    def _fill(self, descriptor: int, position: int, buffer: np.ndarray) -> None:
        view = buffer.data
        while len(view):
            count = os.preadv(descriptor, [view], position)
            if not count:
                raise self.refuse(f"it ends at byte {position}, before its members do")
            view, position = view[count:], position + count
