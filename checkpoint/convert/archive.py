"""Archives of `torch.save`: a zip file, or a part of a file, whose records lie uncompressed; tensors are found, not loaded."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from checkpoint.convert.stored import Files, Strided, itemsize
from checkpoint.convert.unpickle import Storage, unpickle
from checkpoint.state import Spec
from elastic.errors import CheckpointError

_LOCAL = struct.Struct("<4s5H3L2H")
_READ = 4 << 20
"""Bytes that are checked at a time."""


class _Window(io.RawIOBase):
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


class Archive:
    """The records of one archive; `offset` and `length` (bytes) say which part of the file it is, by default the whole."""

    def __init__(self, files: Files, path: Path, offset: int = 0, length: int | None = None, *, trust: bool = False) -> None:
        self.files, self.path, self.offset, self.trust = files, path, offset, trust
        window = _Window(files, path, offset, files.size(path) - offset if length is None else length)
        try:
            infos = zipfile.ZipFile(io.BufferedReader(window)).infolist()
        except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.where} is no archive of torch.save, or it is truncated: {error}") from error
        self._records: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            _, _, name = info.filename.partition("/")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
                raise CheckpointError(f"{self.where}: record {name} is compressed or encrypted; torch.save writes neither")
            self._records[name] = info
        if "data.pkl" not in self._records:
            raise CheckpointError(f"{self.where} has no record data.pkl: it is no archive of torch.save")

    @property
    def where(self) -> str:
        """The file, and the offset if it is a part of one."""
        return f"{self.path}" + (f" at byte {self.offset}" if self.offset else "")

    def _begin(self, name: str) -> tuple[int, int]:
        """Byte offset in the file, and length, of a record."""
        info = self._records.get(name)
        if info is None:
            raise CheckpointError(f"{self.where} has no record {name}")
        start = self.offset + info.header_offset
        header = _LOCAL.unpack(self.files.read(self.path, start, _LOCAL.size))
        if header[0] != b"PK\x03\x04":
            raise CheckpointError(f"{self.where}: the header of record {name} is damaged")
        return start + _LOCAL.size + header[9] + header[10], info.file_size

    def record(self, name: str) -> bytes:
        """The bytes of a small record, checked."""
        data = self.files.read(self.path, *self._begin(name))
        self._check(name, zlib.crc32(data))
        return data

    def _check(self, name: str, crc: int) -> bool:
        """Whether the record has a checksum (torch can be told to write 0); raises if it is another."""
        expected = self._records[name].CRC
        if expected and crc != expected:
            raise CheckpointError(f"{self.where}: record {name} has checksum {crc:08x} instead of {expected:08x}: it is damaged")
        return bool(expected)

    def verify(self) -> tuple[int, int]:
        """Reads all records; bytes that a checksum vouches for, and bytes that have none. Raises CheckpointError naming the damaged one."""
        vouched = bare = 0
        for name in self._records:
            begin, length = self._begin(name)
            crc = 0
            for at in range(0, length, _READ):
                crc = zlib.crc32(self.files.read(self.path, begin + at, min(_READ, length - at)), crc)
            if self._check(name, crc):
                vouched += length
            else:
                bare += length
        return vouched, bare

    def load(self) -> Any:
        """What was saved, with a `Strided` for every tensor."""
        order = self.record("byteorder") if "byteorder" in self._records else b"little"
        if order != b"little":
            raise CheckpointError(f"{self.where} was written on a machine of byte order {order!r}; only little is read")
        return unpickle(self.record("data.pkl"), where=self.where, place=self._place, trust=self.trust)

    def _place(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> Strided:
        begin, length = self._begin(f"data/{storage.key}")
        if storage.count * (itemsize(storage.dtype) if storage.dtype else 1) > length:
            raise CheckpointError(f"{self.where}: record data/{storage.key} has {length} bytes, too few for {storage.count} elements")
        begin += offset * itemsize(dtype)
        return Strided(files=self.files, path=self.path, offset=begin, spec=Spec(shape=shape, dtype=dtype), strides=strides)
