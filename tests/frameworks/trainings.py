"""Train functions with a Trainer of transformers."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import torch
import transformers
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from elastic.integrations.huggingface import ElasticTrainer
from elastic.integrations.huggingface_state import _timeless
from elastic.worker.job import Job

STEPS, WORDS = 6, 32
SHORT: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 1e-2}
SHORT |= {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "save_strategy": "no"}
SHORT |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True}


class Rows(torch.utils.data.Dataset[Any]):
    """Texts of different lengths."""

    def __init__(self, count: int = 20) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> list[int]:
        return [(index * 7 + place) % WORDS for place in range(3 + index % 5)]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    return {"input_ids": labels.clamp_min(0), "attention_mask": (labels >= 0).long(), "labels": labels}


def model(dropout: float = 0.1) -> Any:
    torch.manual_seed(5)
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1, **drops
    )
    return transformers.GPT2LMHeadModel(config)


class Counts(TrainerCallback, ExportableState):
    """Counts what it hears; a worker that joins continues the count."""

    def __init__(self) -> None:
        self.heard: dict[str, int] = {}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"heard": dict(self.heard)}}

    def _hears(self, event: str) -> None:
        self.heard[event] = self.heard.get(event, 0) + 1

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._hears("step")

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self._hears("evaluate")

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._hears("epoch")


def arguments(folder: str, **options: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=folder, **{**SHORT, **options})


def train(
    job: Job,
    folder: str,
    kind: type[ElasticTrainer] = ElasticTrainer,
    patience: int = 9,
    dropout: float = 0.1,
    callback: Any = None,
    **options: Any,
) -> dict[str, Any]:
    counts = Counts()
    given = arguments(folder, metric_for_best_model="loss", **options)
    trainer = kind(
        model(dropout),
        given,
        data_collator=padded,
        train_dataset=Rows(),
        eval_dataset=Rows(8),
        callbacks=[EarlyStoppingCallback(patience), counts, *([] if callback is None else [callback])],
    )
    done = trainer.train()
    return {
        "logs": [_timeless(entry) for entry in trainer.state.log_history if "train_runtime" not in entry],
        "loss": done.training_loss,
        "step": trainer.state.global_step,
        "heard": counts.heard,
        "after": trainer.evaluate()["eval_loss"],
        "best": [trainer.state.best_metric, trainer.state.best_global_step],
        "digest": trainer.digest(),
        "weights": weights(trainer.model),
    }


def weights(of: Any) -> str:
    """The SHA-256 of a model's parameters, as the user's code sees them."""
    return sha256(b"".join(value.contiguous().numpy().tobytes() for value in of.state_dict().values())).hexdigest()


class OwnLoss(ElasticTrainer):
    """Computes its loss by itself, as a mean over the samples of a micro-batch, and adds noise to it."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs)
        loss = outputs.logits.float().pow(2).mean() * (1 + 0.1 * torch.rand(()))
        return (loss, outputs) if return_outputs else loss


class Generates(ElasticTrainer, transformers.Seq2SeqTrainer):
    """A Trainer whose evaluations generate texts."""


def translate(job: Job, folder: str) -> dict[str, Any]:
    """Trains an encoder with a decoder."""
    torch.manual_seed(5)
    config = transformers.T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    given = transformers.Seq2SeqTrainingArguments(**SHORT, output_dir=folder, predict_with_generate=True, generation_max_length=6)
    generated: list[list[int]] = []

    def keep(made: Any) -> dict[str, float]:
        generated.extend(made.predictions.tolist())
        return {}

    rows = {"train_dataset": Rows(), "eval_dataset": Rows(8)}
    trainer = Generates(transformers.T5ForConditionalGeneration(config), given, data_collator=padded, compute_metrics=keep, **rows)
    trainer.train()
    return {"after": trainer.evaluate()["eval_loss"], "generated": generated[-8:], "digest": trainer.digest()}
