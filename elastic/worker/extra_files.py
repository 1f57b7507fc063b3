"""Extra files in a checkpoint, such as a model's `config.json` or a tokenizer, so that other programs can open its directory as it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic.errors import TrainerError

_CONFIGS = ("config", "generation_config")


def extra_files(model: Any, given: Mapping[str, bytes | str | os.PathLike[str]]) -> dict[str, bytes]:
    """Returns the given files by name, and the configuration files of a Hugging Face model (one whose `config` has `to_json_string`).

    Bytes and text are contents; a `Path` names a file to read. Raises TrainerError for anything else.
    """
    found: dict[str, bytes] = {}
    for key in _CONFIGS:
        write = getattr(getattr(model, key, None), "to_json_string", None)
        if callable(write):
            values = json.loads(str(write()))
            if key == "config" and not values.get("architectures"):
                values["architectures"] = [type(model).__name__]
            found[f"{key}.json"] = (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
    return {**found, **{name: _content(name, value) for name, value in given.items()}}


def _content(name: str, value: object) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    if isinstance(value, os.PathLike):
        try:
            return Path(value).read_bytes()
        except OSError as error:
            raise TrainerError(f"checkpoint_files: {value}, for {name}, cannot be read: {error.strerror}") from error
    raise TrainerError(f"checkpoint_files: {name} is a {type(value).__name__}; give its content (bytes or text), or a pathlib.Path")
