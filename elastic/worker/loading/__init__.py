"""Processes that load micro-batches ahead for one worker: a DataLoader's `num_workers`.

    worker  --(code)-->  fork server  --fork-->  loader processes  --(micro-batches)-->  worker

`given.py` reads what a DataLoader says, `ahead.py` decides what is loaded ahead, `pool.py` is the worker's end of the processes, and
`server.py` is what runs in them.
"""
