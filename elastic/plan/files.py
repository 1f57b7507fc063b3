"""Reads clusters and workloads from TOML and JSON files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.errors import PlanError
from elastic.plan.cluster import Cluster
from elastic.plan.profiles import Profiles
from elastic.plan.transformer import Transformer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What to train: samples per step, and the costs of the layers."""

    batch: int
    profiles: Profiles


def read(path: Path) -> Mapping[str, Any]:
    """Reads the table in a .toml or .json file. Raises PlanError, naming file and place, if it cannot be read."""
    try:
        text = path.read_text()
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also one nested too deeply, or with a number of thousands of digits
        raise PlanError(f"{path} is not {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}") from error
    if not isinstance(data, Mapping):
        raise PlanError(f"{path} must be a table, not {type(data).__name__}")
    return data


def cluster(path: Path) -> Cluster:
    """Reads kinds, hosts and links. Raises PlanError naming the file and the wrong field."""
    with named(path):
        return Cluster.from_json(read(path))


def work(path: Path, cluster: Cluster, *, interpolate: bool = False) -> Work:
    """Reads `batch`, and either measured profiles (`seconds` and `bytes`) or a `transformer` whose costs follow from FLOPS.

    With `interpolate`, kinds without a profile are scaled from others by FLOPS. Raises PlanError naming the file and the field.
    """
    data = read(path)
    with named(path):
        batch = data.get("batch")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise PlanError(f"batch must be a whole number of samples a step, not {batch!r}")
        if "transformer" in data:
            if not isinstance(data["transformer"], Mapping):
                raise PlanError(f"transformer must be a table, not {data['transformer']!r}")
            return Work(batch=batch, profiles=Transformer.from_json(data["transformer"]).profiles(cluster))
        profiles = Profiles.from_json(data)
        return Work(batch=batch, profiles=profiles.interpolated(cluster.kinds) if interpolate else profiles)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Puts the file's name in front of the message of a PlanError."""
    try:
        yield
    except PlanError as error:
        if str(error).startswith(str(path)):
            raise
        raise PlanError(f"{path}: {error}") from error
