"""Fine-tunes a small Llama from a Hugging Face directory, of which each worker reads its own layers only.

    python examples/llama.py --workers 3 --stages 3 --steps 10
    python examples/llama.py --workers 3 --stages 3 --weights path/to/a/llama --data notes.txt

Without `--weights`, transformers first makes a tiny model with random weights, and saves it in bfloat16. The fine-tuned model is saved to
`--output`, a directory that `transformers.AutoModelForCausalLM.from_pretrained` opens as it is.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional

import elastic
from elastic.plan.memory import readable

VOCABULARY = 256


def batch(step: int, micro_batch: int, text: bytes, samples: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns windows of the text, and the bytes that follow."""
    generator = torch.Generator().manual_seed(1009 * step + micro_batch)
    starts = torch.randint(len(text) - seq - 1, (samples,), generator=generator).tolist()
    windows = torch.stack([torch.tensor(list(text[start : start + seq + 1])) for start in starts])
    return windows[:, :-1], windows[:, 1:]


def cross_entropy(output: Any, micro_batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The loss: the mean over the micro-batch's tokens."""
    return functional.cross_entropy(output["logits"].flatten(0, 1), micro_batch[1].flatten())


def train(job: elastic.Job, options: dict[str, Any]) -> dict[str, Any] | None:
    """Runs on every worker."""
    from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    config = AutoConfig.from_pretrained(options["weights"])
    trainer = elastic.Trainer(
        lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32),  # its parameters get no memory; it is cut into layers
        cross_entropy,
        lambda parameters: torch.optim.AdamW(parameters, lr=options["lr"], fused=True),
        lambda step, micro_batch: batch(step, micro_batch, options["text"].encode("latin-1"), 2, options["seq"]),
        batch_size=16,
        micro_batch_size=2,
        clip_norm=1.0,
        weights=options["weights"],
        checkpoint=options["output"],
    )
    losses = [report.loss for report in trainer.run(options["steps"])]
    workers, digest = trainer.statistics(), trainer.digest()
    return {"losses": losses, "workers": workers, "digest": digest} if trainer.leader else None


def make_tiny(directory: Path) -> None:
    """Makes a Hugging Face directory with a small Llama of random weights, in bfloat16, in several files."""
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="150kB")


def main(
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 3,
    stages: Annotated[int, typer.Option(help="Pipeline stages; 0 lets the planner choose.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps to take.")] = 10,
    seq: Annotated[int, typer.Option(help="Tokens a sample.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    weights: Annotated[Path | None, typer.Option(help="A Llama in a Hugging Face directory, with 256 tokens or more.")] = None,
    data: Annotated[Path | None, typer.Option(help="A file to train on, instead of this one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to save the fine-tuned model.")] = None,
) -> None:
    """Fine-tunes a Llama; prints what each worker read of its weights."""
    try:
        import transformers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        print("error: this example needs transformers: pip install transformers", file=sys.stderr)
        raise typer.Exit(1) from None
    with tempfile.TemporaryDirectory(prefix="elastic-llama-") as directory:
        if weights is None:
            weights = Path(directory) / "tiny"
            make_tiny(weights)
        text = (data or Path(__file__)).read_bytes().decode("latin-1")
        options = {"weights": str(weights), "text": text, "steps": steps, "seq": seq, "lr": lr, "output": output and str(output)}
        try:
            found = elastic.run(train, workers=workers, stages=stages or None, args=(options,), progress=False).value
        except elastic.errors.ElasticError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        whole = sum(file.stat().st_size for file in weights.glob("*.safetensors"))
    for each in found["workers"]:
        layers = f"layers {each['layers'][0]} to {each['layers'][-1]}"
        read = f"read {each['weights_bytes_read']:,} bytes of {whole:,}"
        print(f"worker {each['worker']}: {layers}, {read}, holds {readable(each['parameter_bytes'])} of parameters")
    print(f"loss {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}")
    print(f"digest {found['digest']}")


if __name__ == "__main__":
    typer.run(main)
