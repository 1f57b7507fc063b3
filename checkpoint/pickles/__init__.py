"""Files of `torch.save`, read without running them and without loading what is not asked for.

Usage: `load(path)` gives the object with every tensor as a lazy `Stored`; `load(path, trusted=True)` lets torch run the pickle.
"""

from checkpoint.pickles.archive import Limits
from checkpoint.pickles.file import TensorRef, load
from checkpoint.pickles.plain import number, plain
from checkpoint.pickles.stored import Stored
from checkpoint.pickles.values import Global, Opaque

__all__ = ["Global", "Limits", "Opaque", "Stored", "TensorRef", "load", "number", "plain"]
