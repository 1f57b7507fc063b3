"""One rank of the real DeepSpeed: trains a tiny model, saves it, and records the state that the engine reports.

Run as `python deepspeed_peer.py CASE.json` with torch's usual RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Not imported by tests.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state


class Tied(torch.nn.Module):
    """An embedding tied to the head, a frozen layer, and norms and biases that take no weight decay."""

    def __init__(self, case: dict) -> None:
        super().__init__()
        width = case.get("width", 6)
        self.embed = torch.nn.Embedding(case.get("vocab", 11), width)
        self.frozen = torch.nn.Linear(width, width)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(case.get("layers", 3)))
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, case.get("vocab", 11), bias=False)
        self.register_buffer("scale", torch.full((3,), 0.5))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        if case.get("tied", True):
            self.head.weight = self.embed.weight
        if case.get("frozen", True):
            self.frozen.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embed(tokens)) * self.scale[0]
        for block in self.blocks:
            hidden = torch.tanh(block(hidden)) + hidden
        logits = self.head(self.norm(hidden))
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.roll(1, 1).flatten())


class Block(torch.nn.Linear):
    """A layer of a pipeline, with a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.register_buffer("scale", torch.full((2,), 0.5))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(hidden)) * self.scale[0] + hidden


def pipeline(case: dict) -> PipelineModule:
    """Two stages whose ends share the embedding."""
    width, vocab = case.get("width", 6), case.get("vocab", 11)

    def head(module: torch.nn.Embedding, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, module.weight)

    def loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    ends = [TiedLayerSpec("embed", torch.nn.Embedding, vocab, width, forward_fn=forward) for forward in (None, head)]
    blocks = [LayerSpec(Block, width) for _ in range(3)]
    return PipelineModule([ends[0], *blocks, LayerSpec(torch.nn.LayerNorm, width), ends[1]], num_stages=2, loss_fn=loss)


def batches(case: dict, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens, and the next ones, of every step."""
    for step in itertools.count(first):
        tokens = torch.randint(case.get("vocab", 11), (2, 5), generator=torch.Generator().manual_seed(step))
        yield tokens, tokens.roll(1, 1)


def groups(model: torch.nn.Module, case: dict) -> list[dict]:
    """A group that decays and one that does not, with learning rates of their own."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if case.get("groups", 2) == 1:
        return [{"params": [p for _, p in named], "lr": 0.01}]
    flat = [p for _, p in named if p.ndim < 2]
    deep = [p for _, p in named if p.ndim >= 2]
    return [{"params": deep, "weight_decay": 0.1, "lr": 0.01}, {"params": flat, "weight_decay": 0.0, "lr": 0.02}]


def optimizer(parameters: list[dict], case: dict) -> torch.optim.Optimizer:
    """The client's optimizer that the case names."""
    kind = case.get("optimizer", "AdamW")
    if kind == "SGD":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    return getattr(torch.optim, kind)(parameters, lr=0.01)


def settings(case: dict, ranks: int) -> dict:
    """DeepSpeed's configuration."""
    config = {"train_batch_size": 2 * ranks, "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
    config["zero_force_ds_cpu_optimizer"] = False
    if case.get("pipe"):
        config |= {"train_batch_size": 4, "gradient_accumulation_steps": 2, "data_types": {"grad_accum_dtype": "fp32"}}
    config["zero_optimization"] = {"stage": case["stage"], **case.get("zero", {})}
    if case.get("bf16", True):
        config["bf16"] = {"enabled": True}
    return {**config, **case.get("config", {})}


def by_round_robin(engine: object, names: dict, keys: list[str]) -> dict:
    """What `state_of` tells, from the flat vectors themselves in the order in which the optimizer laid them out.

    0.19.8 links parameters to their master values in the order before round-robin (`stage_1_and_2.py`, `_link_all_hp_params`), so that
    `safe_get_full_fp32_param` returns the values of other parameters.
    """
    told: dict = {}
    inner = engine.optimizer
    for index, parameters in enumerate(inner.round_robin_bit16_groups):
        mine = inner.single_partition_of_fp32_groups[index]
        for key in ["param", *keys]:
            part = (mine if key == "param" else inner.optimizer.state[mine][key]).detach()
            parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, part)
            full, position = torch.cat(parts), 0
            for parameter in parameters:
                told.setdefault(names[id(parameter)], {})[key] = full[position : position + parameter.numel()].clone()
                position += parameter.numel()
    return told


def state_of(engine: object, model: torch.nn.Module, keys: list[str]) -> dict:
    """Returns the engine's state by name, as DeepSpeed's own utilities report it."""
    told: dict = {}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # Without this, DeepSpeed 0.19.8 (stages 1 and 2 on the CPU) reports that exp_avg is "not found in optimizer state fragment".
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            states = {"param": safe_get_full_fp32_param(parameter)}
            states |= {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            told[name] = {key: value.clone().cpu().reshape(-1) for key, value in states.items()}
    return told


def record(engine: object, model: torch.nn.Module, case: dict) -> dict:
    """The state of the engine, by name."""
    keys = case.get("keys", ["exp_avg", "exp_avg_sq"])
    if case["stage"] == 0:
        states = engine.optimizer.state
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        return {
            name: {"param": parameter.detach().reshape(-1).clone(), **{key: states[parameter][key].reshape(-1).clone() for key in keys}}
            for name, parameter in named
        }
    if case.get("zero", {}).get("round_robin_gradients"):
        return by_round_robin(engine, {id(p): name for name, p in model.named_parameters()}, keys)
    return state_of(engine, model, keys)


def plain_step(engine: object, case: dict, seed: int) -> float:
    """Takes one step of one rank; returns the loss."""
    loss = engine(torch.randint(case.get("vocab", 11), (2, 5), generator=torch.Generator().manual_seed(seed)))
    engine.backward(loss)
    engine.step()
    return loss.item()


def main() -> None:
    """Builds, perhaps loads, trains, records, saves."""
    case = json.loads(Path(sys.argv[1]).read_text())
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(5)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise it is compiled, for minutes, and killed tests leave a lock
    if case.get("pipe"):
        deepspeed.init_distributed("gloo")
    model = pipeline(case) if case.get("pipe") else Tied(case)
    made = optimizer(groups(model, case), case)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step)) if case.get("schedule") else None
    engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=settings(case, ranks), lr_scheduler=schedule)
    if "load" in case:
        engine.load_checkpoint(case["load"], tag=case.get("load_tag"))
    losses, told = [], {}
    stream = batches(case, 2 * case.get("first", 0))
    for step in range(case.get("first", 0), case.get("first", 0) + case.get("steps", 3)):
        losses.append(engine.train_batch(stream).item() if case.get("pipe") else plain_step(engine, case, 100 * step + rank))
        if step + 1 == case.get("save_at"):
            told = record(engine, model, case)
            engine.save_checkpoint(case["save"], tag="t", client_state={"note": "kept", "seed": 7})
    told = told or record(engine, model, case)
    if rank == 0 or case.get("pipe"):
        groups_now = [{k: v for k, v in g.items() if k not in ("params", "preconditioner")} for g in made.param_groups]
        torch.save({"states": told, "losses": losses, "groups": groups_now, "steps": engine.global_steps}, f"{case['record']}{rank or ''}")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries sometimes abort the process at a normal exit
