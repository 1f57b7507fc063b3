"""Clusters and profiles as in files."""

from __future__ import annotations

import dataclasses
from typing import Any

from elastic.plan.cluster import Cluster, Levels, LinkMatrix
from elastic.plan.curves import Curve
from elastic.plan.profiles import Profiles


def curve_json(curve: Curve) -> dict[str, Any]:
    values = {field.name: getattr(curve, field.name) for field in dataclasses.fields(curve)}  # type: ignore[arg-type]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def links_json(links: Levels | LinkMatrix) -> dict[str, Any]:
    if isinstance(links, LinkMatrix):
        return {"matrix": [{"from": list(a[:3]), "to": list(b[:3]), **curve_json(curve)} for (a, b), curve in links.curves.items()]}
    levels = {name: getattr(links, name) for name in ("within_host", "within_zone", "between_zones")}
    return {"levels": {name: curve_json(curve) for name, curve in levels.items() if curve is not None}}


def cluster_json(cluster: Cluster) -> dict[str, Any]:
    kinds = [{name: value for name, value in dataclasses.asdict(kind).items() if value is not None} for kind in cluster.kinds.values()]
    return {"kinds": kinds, "hosts": [dataclasses.asdict(host) for host in cluster.hosts], "links": links_json(cluster.links)}


def profiles_json(profiles: Profiles) -> dict[str, Any]:
    return {
        "seconds": [{"kind": m.kind, "size": m.size, "tp": m.tp, "layers": [list(x) for x in v]} for m, v in profiles.seconds.items()],
        "bytes": [{"tp": tp, "layers": [list(layer) for layer in layers]} for tp, layers in profiles.bytes.items()],
    }
