"""Files of `torch.save`, read without running them and without loading what is not asked for.

Usage: `load(path)` gives the object with every tensor as a lazy `Readable`; `load(path, trusted=True)` runs the pickle.
"""

from checkpoint.pickles.archive import Archive
from checkpoint.pickles.file import load, load_archive, load_bare
from checkpoint.pickles.origin import Limits
from checkpoint.pickles.plain import number, plain
from checkpoint.pickles.values import Global, Opaque

__all__ = ["Archive", "Global", "Limits", "Opaque", "load", "load_archive", "load_bare", "number", "plain"]
