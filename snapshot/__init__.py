"""Copies of training state in memory: previous copies of a worker's own shards, replicas that it keeps for others, and their digests."""
