"""Files of `torch.save`, read without running them and without loading what is not asked for.

Usage: `load(path)` gives the object with every tensor as a lazy `Readable`; `load(path, trusted=True)` runs the pickle.
"""

from elastic.checkpoint.pickles.archive import Archive
from elastic.checkpoint.pickles.file import load, load_archive, load_bare
from elastic.checkpoint.pickles.origin import PickleLimits
from elastic.checkpoint.pickles.plain import number, plain
from elastic.checkpoint.pickles.values import Global, Opaque

__all__ = ["Archive", "Global", "Opaque", "PickleLimits", "load", "load_archive", "load_bare", "number", "plain"]
