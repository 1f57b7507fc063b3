"""Trains a small classifier with Hugging Face Accelerate: `accelerated_torch.py` with a few lines changed (docs/frameworks.md)."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import elastic
from elastic.integrations.accelerate import ElasticAccelerator


def spirals(samples: int, seed: int) -> TensorDataset:
    """Returns points of three spirals, with the number of the spiral."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (samples,), generator=generator)
    radius = torch.rand(samples, generator=generator)
    angle = 4 * radius + 2.1 * kind + 0.2 * torch.randn(samples, generator=generator)
    return TensorDataset(torch.stack([radius * angle.sin(), radius * angle.cos()], dim=1), kind)


def main(job: elastic.Job) -> str | None:
    torch.manual_seed(1)
    accelerator = ElasticAccelerator(gradient_accumulation_steps=8)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=80)
    loader = DataLoader(spirals(2048, seed=1), batch_size=32, shuffle=True)
    held_out = DataLoader(spirals(1024, seed=2), batch_size=256)
    model, optimizer, loader, held_out, scheduler = accelerator.prepare(model, optimizer, loader, held_out, scheduler)

    for epoch in loader.epochs(10):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            known = [torch.as_tensor(accelerator.gather_for_metrics((model(x).argmax(1) == y).float())) for x, y in held_out]
        accelerator.print(f"epoch {epoch}: accuracy {torch.cat(known).mean():.3f}")
    return loader.digest()


if __name__ == "__main__":
    elastic.run(main, workers=3)
