"""The zip file that `torch.save` makes: a pickle, and one stored (never compressed) member per storage, read by byte range.

Layout, from torch 2.13 `torch/serialization.py` and `caffe2/serialize/inline_container.cc`: all members lie under one folder; `data.pkl` is
the pickle, `data/<key>` the bytes of a storage, `byteorder` says `little` or `big` (absent in old files: little). An archive may be a part
of a file, as in torch's distributed checkpoints.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.checkpoint.pickles.origin import Origin, PickleLimits
from elastic.checkpoint.stored import Files

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, then (after 22 bytes that the central directory repeats) the lengths of name and extra field."""

_ENCRYPTED = 1
_CHUNK = 4 << 20
_SMALL = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveMember:
    """A stored run of the archive: where its local header starts, its length in bytes, and its CRC-32."""

    header: int
    size: int
    crc: int


class _Window(io.RawIOBase):
    """A part of a file as `zipfile` wants it."""

    def __init__(self, files: Files, path: Path, offset: int, length: int) -> None:
        self._files, self._path, self._offset, self._length, self._position = files, path, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._length)[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self._length - self._position))
        if count:
            self._files.read_into(self._path, self._offset + self._position, memoryview(buffer)[:count])
            self._position += count
        return count


class Archive(Origin):
    """The members of one archive by their name without the folder; by default it is the whole file.

    offset, length: bytes. Raises CheckpointError naming the file and the reason.
    """

    def __init__(
        self, path: Path, limits: PickleLimits | None = None, *, files: Files | None = None, offset: int = 0, length: int | None = None
    ) -> None:
        super().__init__(path, limits or PickleLimits(), files=files, offset=offset)
        self._length = self.files.size(path) - offset if length is None else length
        self._members = self._list()
        if "data.pkl" not in self._members:
            raise self.refuse("it holds no data.pkl, so torch.save did not write it")
        if "constants.pkl" in self._members:
            raise self.refuse("it is a TorchScript archive, which is a program, not a checkpoint")
        if "byteorder" in self._members and self.whole("byteorder", _SMALL) != b"little":
            raise self.refuse("its byte order is not little-endian")

    def size(self, name: str) -> int:
        """Bytes of a member."""
        if name not in self._members:
            raise self.refuse(f"it has no member {name!r}")
        return self._members[name].size

    def begin(self, name: str) -> int:
        """Where in the file a member's bytes begin."""
        self.size(name)
        start = self.offset + self._members[name].header
        header = self.files.read(self.path, start, _LOCAL_HEADER.size)
        if header[:4] != b"PK\3\4":
            raise self.refuse(f"member {name!r} has no header where the directory says")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        return start + _LOCAL_HEADER.size + name_bytes + extra_bytes

    def storage(self, key: str) -> tuple[int, int]:
        """Where in the file a storage begins, and its bytes."""
        name = f"data/{key}"
        return self.begin(name), self.size(name)

    def whole(self, name: str, limit: int) -> bytes:
        """All bytes of a member that may have at most `limit`, compared with its CRC-32."""
        size = self.size(name)
        if size > limit:
            raise self.refuse(f"member {name!r} has {size} bytes, more than the limit of {limit}")
        data = self.files.read(self.path, self.begin(name), size)
        self._vouched(name, zlib.crc32(data))
        return data

    def verify(self) -> tuple[int, int]:
        """Reads every member; bytes that a CRC-32 vouches for, and bytes that have none. Raises CheckpointError naming a damaged one."""
        vouched = bare = 0
        for name, member in self._members.items():
            begin, crc = self.begin(name), 0
            for at in range(0, member.size, _CHUNK):
                crc = zlib.crc32(self.files.read(self.path, begin + at, min(_CHUNK, member.size - at)), crc)
            if self._vouched(name, crc):
                vouched += member.size
            else:
                bare += member.size
        return vouched, bare

    def _vouched(self, name: str, crc: int) -> bool:
        """Whether the member has a checksum (torch can be told to write 0); raises if it is another."""
        expected = self._members[name].crc
        if expected and crc != expected:
            raise self.refuse(f"member {name!r} is damaged: its CRC-32 is {crc:08x} instead of {expected:08x}")
        return bool(expected)

    def _list(self) -> dict[str, ArchiveMember]:
        window = _Window(self.files, self.path, self.offset, self._length)
        try:
            with zipfile.ZipFile(io.BufferedReader(window)) as file:
                infos = file.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OverflowError) as error:
            zipped = self._length >= 2 and self.files.read(self.path, self.offset, 2) == b"PK"
            legacy = "" if zipped else "; files of torch before 1.6 are not zip files and need --trust-pickle"
            raise self.refuse(f"it is not a zip file that torch.save wrote, or it is truncated ({error}{legacy})") from error
        if len(infos) > self.limits.members:
            raise self.refuse(f"it has {len(infos)} members, more than the limit of {self.limits.members}")
        members: dict[str, ArchiveMember] = {}
        for info in infos:
            name = info.filename.partition("/")[2]
            self._check(info, name, members)
            members[name] = ArchiveMember(header=info.header_offset, size=info.file_size, crc=info.CRC)
        return members

    def _check(self, info: zipfile.ZipInfo, name: str, before: dict[str, ArchiveMember]) -> None:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & _ENCRYPTED:
            raise self.refuse(f"member {info.filename!r} is compressed or encrypted; torch.save stores")
        if name in before or not name:
            raise self.refuse(f"member {info.filename!r} is there twice, or lies in no folder")
        if not 0 <= info.header_offset <= self._length or info.file_size > self._length:
            raise self.refuse(f"member {info.filename!r} says it has {info.file_size} bytes, the whole has {self._length}")
