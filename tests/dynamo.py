"""Imports torch._dynamo, as the first optimizer otherwise does: this takes a second and leaves a directory in /tmp."""

from __future__ import annotations

import tempfile

import pytest

with tempfile.TemporaryDirectory() as _cache, pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("TORCHINDUCTOR_CACHE_DIR", _cache)
    import torch._dynamo  # noqa: F401
