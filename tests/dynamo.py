"""Imports torch._dynamo, which the first optimizer would do otherwise: it takes a second, and makes a directory that would stay in /tmp."""

from __future__ import annotations

import tempfile

import pytest

with tempfile.TemporaryDirectory() as _cache, pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("TORCHINDUCTOR_CACHE_DIR", _cache)
    import torch._dynamo  # noqa: F401
