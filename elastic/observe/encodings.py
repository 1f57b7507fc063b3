"""Output streams whose encoding lacks characters, such as ASCII under `PYTHONIOENCODING=ascii` or in a plain container."""

from __future__ import annotations

import io
import sys
from typing import IO

_FAIL = ("strict", "surrogateescape")  # how streams handle what they cannot encode; stderr has "backslashreplace"


def replace_unencodable() -> None:
    """Makes stdout and stderr print `?` for characters that their encoding lacks, instead of raising UnicodeEncodeError.

    A stream whose error handler raises nothing keeps it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _FAIL:  # else closed, or replaced by a package
            stream.reconfigure(errors="replace")


def encodable(text: str, stream: IO[str]) -> str:
    """Returns the text with `?` for characters that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
