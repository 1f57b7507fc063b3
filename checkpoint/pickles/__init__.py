"""Reads files of `torch.save` without running the pickle, and loads only the tensors that are requested.

Usage: `load(path)` returns the object with every tensor as a lazy `ReadableTensor`; `load(path, trusted=True)` runs the pickle.
"""

from elastic.checkpoint.pickles.archive import Archive
from elastic.checkpoint.pickles.file import load, load_archive, load_bare
from elastic.checkpoint.pickles.origin import PickleLimits
from elastic.checkpoint.pickles.plain import number, plain
from elastic.checkpoint.pickles.values import Global, Opaque

__all__ = ["Archive", "Global", "Opaque", "PickleLimits", "load", "load_archive", "load_bare", "number", "plain"]
