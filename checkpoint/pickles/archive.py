"""The zip file that `torch.save` makes: a pickle, and one stored (never compressed) member per storage, read by byte range.

Layout, from torch 2.13 `torch/serialization.py` and `caffe2/serialize/inline_container.cc`: all members are in one folder; `data.pkl` is
the pickle, `data/<key>` the bytes of a storage, `byteorder` holds `little` or `big` (absent in old files: little). An archive may be a part
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
"""Signature, 22 bytes that the central directory repeats, and the lengths of name and extra field."""

_ENCRYPTED = 1
_CHUNK = 4 << 20
_SMALL = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveMember:
    """A stored member of the archive: the offset of its local header, its length in bytes, and its CRC-32."""

    header: int
    size: int
    crc: int


class _Window(io.RawIOBase):
    """A part of a file as a stream for `zipfile`."""

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
    """One archive, with members by their name without the folder; by default it is the whole file.

    offset, length: bytes. Raises CheckpointError with the file and the reason.
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
        """Returns the bytes of a member. Raises CheckpointError if it does not exist."""
        if name not in self._members:
            raise self.refuse(f"it has no member {name!r}")
        return self._members[name].size

    def begin(self, name: str) -> int:
        """Returns the offset in the file of a member's bytes."""
        self.size(name)
        start = self.offset + self._members[name].header
        header = self.files.read(self.path, start, _LOCAL_HEADER.size)
        if header[:4] != b"PK\3\4":
            raise self.refuse(f"member {name!r} has no header at the offset that the zip directory lists")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        return start + _LOCAL_HEADER.size + name_bytes + extra_bytes

    def storage(self, key: str) -> tuple[int, int]:
        """Returns a storage's offset in the file, and its bytes."""
        name = f"data/{key}"
        return self.begin(name), self.size(name)

    def whole(self, name: str, limit: int) -> bytes:
        """Reads a member of at most `limit` bytes, and checks its CRC-32."""
        size = self.size(name)
        if size > limit:
            raise self.refuse(f"member {name!r} has {size} bytes, more than the limit of {limit}")
        data = self.files.read(self.path, self.begin(name), size)
        self._check_crc(name, zlib.crc32(data))
        return data

    def verify(self) -> tuple[int, int]:
        """Reads every member; returns the bytes with a correct CRC-32 and those without one. Raises CheckpointError for a damaged one."""
        checked = bare = 0
        for name, member in self._members.items():
            begin, crc = self.begin(name), 0
            for at in range(0, member.size, _CHUNK):
                crc = zlib.crc32(self.files.read(self.path, begin + at, min(_CHUNK, member.size - at)), crc)
            if self._check_crc(name, crc):
                checked += member.size
            else:
                bare += member.size
        return checked, bare

    def _check_crc(self, name: str, crc: int) -> bool:
        """Returns whether the member has a checksum (torch has an option to write 0); raises CheckpointError if it differs."""
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
            raise self.refuse(f"member {info.filename!r} is compressed or encrypted, so torch.save did not write it")
        if name in before or not name:
            raise self.refuse(f"member {info.filename!r} occurs twice, or is in no folder")
        if not 0 <= info.header_offset <= self._length or info.file_size > self._length:
            raise self.refuse(f"member {info.filename!r} with {info.file_size} bytes lies outside the archive of {self._length} bytes")
