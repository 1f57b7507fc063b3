"""The user's script: how it is named and loaded, and the digests of its code."""
