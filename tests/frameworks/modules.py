"""Train functions with a Lightning Trainer."""

from __future__ import annotations

import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.nn import functional
from torch.utils.data import DataLoader

from elastic.integrations.lightning import ElasticStrategy
from elastic.worker.job import Job
from tests.frameworks.loops import data
from tests.plain.loops import adamw, model


class Module(lightning.LightningModule):
    """Logs its loss, in an epoch and in a step, and a value that is another in each micro-batch."""

    def __init__(self, plateau: bool = False, rate: float = 3e-3) -> None:
        super().__init__()
        self.net, self._plateau, self._rate = model(), plateau, rate

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        loss = functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("mean", x.mean())
        return loss

    def validation_step(self, batch: Any) -> None:
        x, y = batch
        self.log("held_out", functional.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = adamw(self.net)
        optimizer.param_groups[0]["lr"] = self._rate
        if self._plateau:
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "held_out"}}
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


class Seen(lightning.Callback):
    """Counts batches, and notes what was logged."""

    def __init__(self) -> None:
        self.batches = 0
        self.noted: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        self.noted.append(
            (trainer.global_step, trainer.current_epoch, batch_idx, outputs["loss"].item(), trainer.optimizers[0].param_groups[0]["lr"])
        )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.noted.append(
            (trainer.current_epoch, trainer.callback_metrics["loss_epoch"].item(), trainer.callback_metrics["held_out"].item())
        )


def train(
    job: Job,
    patience: int = 9,
    plateau: bool = False,
    rate: float = 3e-3,
    checkpoint: str | None = None,
    processes: int = 0,
    **options: Any,
) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # of Lightning, about loaders without worker processes
    own = {} if checkpoint is None else {"checkpoint": checkpoint}
    seen, strategy = Seen(), ElasticStrategy(**own)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy=strategy,
        accumulate_grad_batches=4,
        callbacks=[EarlyStopping("loss_epoch", min_delta=10.0 if patience < 9 else 0.0, patience=patience), seen],
        **{"max_epochs": 3, "gradient_clip_val": 0.5, **quiet, **options},
    )
    loader = DataLoader(data(), batch_size=8, shuffle=True, num_workers=processes)
    trainer.fit(Module(plateau, rate), loader, DataLoader(data(), batch_size=24))
    return {"noted": seen.noted, "batches": seen.batches, "step": trainer.global_step, "digest": strategy.digest()}
