"""Statistics of one worker: memory, traffic and micro-batches."""

from __future__ import annotations

import resource
from typing import Any

from elastic.engine.model import LayeredModel
from elastic.engine.zero import ShardedOptimizer
from elastic.worker.checkpointing import Checkpoints
from elastic.worker.engine import Engine


def own_statistics(
    worker: int, engine: Engine, model: LayeredModel, optimizer: ShardedOptimizer, checkpoints: Checkpoints | None
) -> dict[str, Any]:
    """Returns the worker's statistics as JSON, sizes in bytes."""
    frozen, layers = model.spec.frozen, engine.view.plan.stages[engine.executor.pipe.stage].layers
    owned = [(layer, interval) for layer, interval in engine.view.layout.owned(worker) if layer not in frozen]
    flats = [*model.flats.items(), *((home, run) for (home, _), run in model.tied.items())]
    held = sum(flat.nbytes for layer, flat in flats if layer not in frozen)
    return {
        "worker": worker,
        "stage": engine.executor.pipe.stage,
        "layers": list(layers),
        "parameter_bytes": held,
        "frozen_bytes": sum(flat.nbytes for layer, flat in flats if layer in frozen),
        "owned_parameter_bytes": sum(interval.elements * model.dtype(layer).itemsize for layer, interval in owned),
        "weights_bytes_read": 0 if model.initial is None else model.initial.bytes_read,
        "optimizer_bytes": optimizer.state_bytes,
        "previous_bytes": engine.previous_copies.bytes,
        "copy_wait_s": engine.previous_copies.waited_s,
        "save_stalls": [] if checkpoints is None else checkpoints.stalls,
        "replica_bytes": engine.replicator.state_bytes,
        "replica_update_bytes": engine.replicator.update_bytes,
        "micro_batches": {str(engine.executor.pipe.stage): engine.executor.micro_batches_run},
        "micro_batches_in_flight": engine.executor.most_in_flight,
        "activation_bytes": engine.executor.most_in_flight * sum(engine.view.workload.layers[layer].activation_bytes for layer in layers),
        "gradient_buffer_bytes": engine.reducer.meter.peak + engine.reducer.total_bytes,
        "received_gradient_bytes": engine.reducer.received_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
