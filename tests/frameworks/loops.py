"""Train functions with loops of Accelerate."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from elastic.integrations.accelerate import ElasticAccelerator
from elastic.worker.job import Job
from tests.plain.loops import CLASSES, WIDTH, adamw, model

PASSES = 3


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(64, WIDTH, generator=generator), torch.randint(0, CLASSES, (64,), generator=generator))


def accelerated(job: Job, precision: str = "no", processes: int = 0, **options: Any) -> dict[str, Any]:
    accelerator = ElasticAccelerator(gradient_accumulation_steps=4, mixed_precision=precision, prepare_options=options)
    net, held_out = model(), DataLoader(data(), batch_size=24)
    loader = DataLoader(data(), batch_size=8, shuffle=True, num_workers=processes)
    optimizer = adamw(net)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    net, optimizer, loader, held_out, scheduler = accelerator.prepare(net, optimizer, loader, held_out, scheduler)
    assert len(loader) == 8
    reports, losses, updates = [], [], 0
    for _ in loader.epochs(PASSES):
        net.train()
        for x, y in loader:
            with accelerator.accumulate(net):
                loss = functional.cross_entropy(net(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                updates += 1
                reports.append((loader.report.step, loader.report.loss, loader.report.grad_norm, loader.report.lr))
                if "checkpoint" in options and loader.report.step == 3:
                    accelerator.save_state()
        net.eval()
        with torch.no_grad():
            found = [accelerator.gather_for_metrics(functional.cross_entropy(net(x), y, reduction="none")) for x, y in held_out]
        losses.append(torch.cat(found).sum().item())
    assert updates == len(reports)
    return {"reports": reports, "losses": losses, "digest": loader.digest()}
