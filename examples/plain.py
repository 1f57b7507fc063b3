"""Trains a small classifier on elastic workers: `plain_torch.py` with a few lines changed, which docs/dropin.md shows."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import elastic


def spirals(samples: int, seed: int) -> TensorDataset:
    """Returns points of three spirals, with the number of the spiral."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (samples,), generator=generator)
    radius = torch.rand(samples, generator=generator)
    angle = 4 * radius + 2.1 * kind + 0.2 * torch.randn(samples, generator=generator)
    return TensorDataset(torch.stack([radius * angle.sin(), radius * angle.cos()], dim=1), kind)


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Returns the share of points that the model knows the spiral of."""
    x, y = data.tensors
    model.eval()
    with torch.no_grad():
        share = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return share


def main(job: elastic.Job) -> str | None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(spirals(2048, seed=1), batch_size=256, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, micro_batch_size=16)

    for epoch in loader.epochs(10):
        for x, y in loader:
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if job.leader:
            print(f"epoch {epoch}: accuracy {accuracy(model, spirals(1024, seed=2)):.3f}")
    return loader.digest()


if __name__ == "__main__":
    elastic.run(main, workers=4)
