"""The announcement of a worker with a fake model."""

from __future__ import annotations

from typing import Any

from elastic.layout.regions import LayerSpec, ModelSpec

LAYERS = 4
MODEL = ModelSpec(layers=tuple(LayerSpec.build(index, [(f"{index}.weight", (64, 64), "float32")]) for index in range(LAYERS)))


def announcement(*, profile: bool = False) -> dict[str, Any]:
    """Enough for a first view; the profile is the measuring worker's."""
    return {
        "address": "unix:@nowhere",
        "fingerprint": {"torch": "2", "MKL_CBWR": "AVX2,STRICT"},
        "model": MODEL.to_json(),
        "digest": "d",
        "profile": [[0.01, 0.02, 4096, 1000]] * LAYERS if profile else None,
        "micro_batches": 8,
        "grains": 8,
        "settings": {"batch_size": 32},
    }
