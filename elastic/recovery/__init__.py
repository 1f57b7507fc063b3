"""How a job goes on after its members change: one state machine, and the pure decisions it takes."""
