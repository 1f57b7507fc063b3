"""Trains a small classifier with Lightning: `lightning_module_torch.py` with a few lines changed (docs/frameworks.md)."""

import lightning
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import elastic
from elastic.integrations.lightning import ElasticStrategy


def spirals(samples: int, seed: int) -> TensorDataset:
    """Returns points of three spirals, with the number of the spiral."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (samples,), generator=generator)
    radius = torch.rand(samples, generator=generator)
    angle = 4 * radius + 2.1 * kind + 0.2 * torch.randn(samples, generator=generator)
    return TensorDataset(torch.stack([radius * angle.sin(), radius * angle.cos()], dim=1), kind)


class Classifier(lightning.LightningModule):
    """Knows the spiral of a point."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        loss = functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(job: elastic.Job) -> str | None:
    torch.manual_seed(1)
    strategy = ElasticStrategy()
    trainer = lightning.Trainer(
        strategy=strategy,
        max_epochs=10,
        accumulate_grad_batches=8,
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        Classifier(), DataLoader(spirals(2048, seed=1), batch_size=32, shuffle=True), DataLoader(spirals(1024, seed=2), batch_size=256)
    )
    if job.leader:
        print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")
    return strategy.digest()


if __name__ == "__main__":
    elastic.run(main, workers=3)
