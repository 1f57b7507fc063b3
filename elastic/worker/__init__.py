"""A training process: the trainer, its step loop, migration, saving and restoring."""
