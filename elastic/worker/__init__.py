"""What a training process is: the trainer, its step loop, migration, saving and restoring."""
