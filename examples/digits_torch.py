"""Trains a classifier of handwritten digits: an ordinary PyTorch script. `digits.py` is the same with elastic (docs/dropin.md)."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """scikit-learn's pictures of 8 x 8 pixels. Those to train on are moved by up to a pixel, each time another way."""

    def __init__(self, train: bool) -> None:
        pictures, labels = load_digits(return_X_y=True)
        split = slice(None, 1400) if train else slice(1400, None)
        self.pictures = torch.tensor(pictures[split], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        self.labels, self.train = labels[split].tolist(), train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = self.pictures[index]
        if self.train:
            down, right = torch.randint(0, 3, (2,)).tolist()
            picture = functional.pad(picture, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
        return picture, self.labels[index]


def build() -> nn.Module:
    """Returns a small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, 10),
    )


def accuracy(model: nn.Module, loader: DataLoader[tuple[torch.Tensor, int]]) -> float:
    """Returns the share of pictures whose digit the model knows."""
    model.eval()
    with torch.no_grad():
        known = [(model(x).argmax(1) == y).float() for x, y in loader]
    model.train()
    return torch.cat(known).mean().item()


def main() -> None:
    torch.manual_seed(1)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * 1400 // 64)
    held_out = DataLoader(Digits(train=False), batch_size=397)
    loader = DataLoader(Digits(train=True), batch_size=64, shuffle=True, num_workers=2)

    for epoch in range(4):
        for x, y in loader:
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        print(f"epoch {epoch}: accuracy {accuracy(model, held_out):.3f}")


if __name__ == "__main__":
    main()
