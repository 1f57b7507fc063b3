"""Trains a small GAN: a plain script, which `gan.py` has with a few lines changed."""

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.utils.data import DataLoader, TensorDataset


def moons(samples: int, seed: int) -> TensorDataset:
    """Returns points of two half circles."""
    generator = torch.Generator().manual_seed(seed)
    side = 2.0 * torch.randint(0, 2, (samples,), generator=generator) - 1
    angle = torch.pi * torch.rand(samples, generator=generator)
    points = torch.stack([side * angle.cos() - side / 2, side * angle.sin() - side / 4], dim=1)
    return TensorDataset(points + 0.05 * torch.randn(samples, 2, generator=generator))


def distance(generator: nn.Module) -> float:
    """Returns how far means and covariances of generated points are from those of the data."""
    noise = torch.randn(2048, 8, generator=torch.Generator().manual_seed(3))
    generator.eval()
    with torch.no_grad():
        made, (real,) = generator(noise), moons(2048, seed=2).tensors
    generator.train()
    return ((made.mean(0) - real.mean(0)).norm() + (made.T.cov() - real.T.cov()).norm()).item()


def main() -> None:
    torch.manual_seed(1)
    generator = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    discriminator = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    opt_g = torch.optim.Adam(generator.parameters(), lr=3e-4, betas=(0.5, 0.999))
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    loader = DataLoader(moons(2048, seed=1), batch_size=256, shuffle=True)

    for epoch in range(10):
        for (real,) in loader:
            fake = generator(torch.randn(len(real), 8))
            ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)

            opt_d.zero_grad()
            loss_d = bce(discriminator(real), ones) + bce(discriminator(fake.detach()), zeros)
            loss_d.backward()
            opt_d.step()

            opt_g.zero_grad()
            loss_g = bce(discriminator(fake), ones)
            loss_g.backward()
            opt_g.step()
        print(f"epoch {epoch}: distance {distance(generator):.3f}")


if __name__ == "__main__":
    main()
