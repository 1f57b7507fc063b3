"""One rank of the real Megatron-Core on the CPU: trains a tiny GPT and saves it in both of Megatron's formats, or resumes from one.

Run as `python megatron_peer.py CASE.json` with torch's usual RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Not imported by tests.

`megatron.core.dist_checkpointing.save` writes `torch_dist`. Megatron-LM's training code writes the legacy format, but it is not a package.
So this file makes the legacy file from the state dicts that Megatron-Core's model and optimizer return, under the keys and paths of
`megatron/training/checkpointing.py` (`generate_state_dict`, `get_checkpoint_name`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode

HIDDEN, HEADS, GROUPS, FFN, LAYERS, VOCAB, LENGTH = 16, 4, 2, 24, 4, 24, 8


def arguments(case: dict) -> argparse.Namespace:
    """Returns what Megatron-LM keeps as `args`, as far as it describes the model."""
    return argparse.Namespace(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        group_query_attention=True,
        num_query_groups=GROUPS,
        kv_channels=HIDDEN // HEADS,
        swiglu=case["swiglu"],
        untie_embeddings_and_output_weights=not case["tied"],
        padded_vocab_size=VOCAB,
        tensor_model_parallel_size=case["tp"],
        pipeline_model_parallel_size=case["pp"],
        virtual_pipeline_model_parallel_size=None,
        use_distributed_optimizer=False,
        params_dtype=dtype(case),
    )


def dtype(case: dict) -> torch.dtype:
    return torch.bfloat16 if case["bf16"] else torch.float32


def build(case: dict) -> GPTModel:
    """The part of the model that this rank has."""
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        use_cpu_initialization=True,
        gated_linear_unit=case["swiglu"],
        activation_func=torch.nn.functional.silu if case["swiglu"] else torch.nn.functional.gelu,
        bias_activation_fusion=False,
        add_bias_linear=not case["swiglu"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=case["tp"],
        pipeline_model_parallel_size=case["pp"],
        pipeline_dtype=dtype(case),
        bf16=case["bf16"],
        params_dtype=dtype(case),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    torch.manual_seed(7)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=case["tied"],
        position_embedding_type="rope",
    )
    return model.to(dtype(case))


class WithoutCuda(TorchFunctionMode):
    """Megatron-Core puts its own small tensors onto `cuda` and asks for the types of CUDA tensors; nothing else of it needs a GPU here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        made = function(*args, **kwargs)
        return made.replace("torch.", "torch.cuda.") if function is torch.Tensor.type and len(args) == 1 else made


def gradients(model: GPTModel) -> None:
    """Sets each element's gradient from its own value, so that no layout can change the gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.sin(17 * parameter.detach().float()).to(parameter.dtype)


def optimizer(model: GPTModel, case: dict):
    """Adam as Megatron makes it: two groups, main parameters in float32 where the model is in bfloat16."""
    model.ddp_config = DistributedDataParallelConfig()
    settings = OptimizerConfig(optimizer="adam", lr=0.01, weight_decay=0.1, clip_grad=0.0, bf16=case["bf16"], params_dtype=dtype(case))
    return get_megatron_optimizer(settings, [model])


def step(model: GPTModel, optim) -> None:
    gradients(model)
    assert optim.step()[0]


def sharded(model: GPTModel, optim, loading: bool = False) -> dict:
    """Returns what Megatron-LM passes to `dist_checkpointing`."""
    model_state = model.sharded_state_dict()
    return {"model": model_state, "optimizer": optim.sharded_state_dict(model_state, is_loading=loading)}


def save(model: GPTModel, optim, case: dict) -> None:
    """Both formats, in one directory each."""
    common = {"args": arguments(case), "checkpoint_version": 3.0, "iteration": 3}
    whole = Path(case["root"]) / "torch_dist" / "iter_0000003"
    whole.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save({**common, **sharded(model, optim)}, str(whole))
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    folder = Path(case["root"]) / "legacy" / "iter_0000003" / (f"mp_rank_{tp:02d}" if case["pp"] == 1 else f"mp_rank_{tp:02d}_{pp:03d}")
    folder.mkdir(parents=True)
    state = {"model": model.state_dict_for_save_checkpoint(), "optimizer": optim.state_dict()}
    torch.save({**common, **state, "num_floating_point_operations_so_far": 0}, folder / "model_optim_rng.pt")
    for kind in ("legacy", "torch_dist"):
        (Path(case["root"]) / kind / "latest_checkpointed_iteration.txt").write_text("3")


def record(model: GPTModel, optim) -> dict:
    """Every state by name, as the optimizer itself holds it."""
    mains, optim = {}, optim.chained_optimizers[0]
    groups = zip(getattr(optim, "float16_groups", []), getattr(optim, "fp32_from_float16_groups", []), strict=True)
    for small, large in groups:
        mains |= {id(one): other for one, other in zip(small, large, strict=True)}
    told = {}
    for name, parameter in model.named_parameters():
        main = mains.get(id(parameter), parameter)
        inner = optim.optimizer.state[main]
        states = {"param": main, "exp_avg": inner["exp_avg"], "exp_avg_sq": inner["exp_avg_sq"]}
        told[name] = {key: value.detach().clone() for key, value in states.items()}
    return told


def resume(model: GPTModel, optim, case: dict) -> None:
    """Megatron's own load, resharding included, and what the next step makes of it."""
    folder = str(Path(case["root"]) / "torch_dist" / "iter_0000003")
    state = dist_checkpointing.load(sharded(model, optim, loading=True), folder)
    model.load_state_dict(state["model"])
    optim.load_state_dict(state["optimizer"])
    before = record(model, optim)
    step(model, optim)
    torch.save({"before": before, "after": record(model, optim)}, case["record"])


def main() -> None:
    """Builds; saves or loads."""
    case = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    torch.cuda.current_device, torch.cuda.synchronize = lambda: "cpu", lambda: None
    with WithoutCuda():
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(case["tp"], case["pp"])
        model = build(case)
        optim = optimizer(model, case)
        if "record" in case:
            resume(model, optim, case)
        else:
            for _ in range(3):
                step(model, optim)
            save(model, optim, case)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries sometimes abort the process at a normal exit
