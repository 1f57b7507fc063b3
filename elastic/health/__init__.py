"""Which worker fails without announcing it, and the evidence. Pure: it decides on what others have measured."""
