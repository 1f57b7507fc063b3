"""The user's script: names it, loads it, and digests its code."""
