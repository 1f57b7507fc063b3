"""The plain loop: an ordinary training loop over a model of any kind, with the promise of a Trainer.

    model, optimizer, loader = job.prepare(model, optimizer, dataset, batch_size=64, micro_batch_size=4)
    for x, y in loader:
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

To the engine, the whole model is one layer, and a run of the loop's body on a micro-batch is that layer's forward. The engine runs in a
second greenlet of the same thread (`turns.py`); the layer's forward switches to the user's loop, where the loader returns the micro-batch;
the body computes forward, loss and backward; `optimizer.step()` switches back with loss and gradients (`loop.py`). So everything else is
the Trainer's: keyed data and randomness, sums in a fixed tree, ZeRO-1 over all workers, recovery, joining, checkpoints. A step that is
computed again is more turns of the loop. A body that is given a committed step gets it when it is complete on all workers, so no recovery
needs a body while that one runs.
"""
