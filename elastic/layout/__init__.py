"""Who holds which run of which layer: coordinates, layouts, the transfers between them, and their invariants. Pure values."""
