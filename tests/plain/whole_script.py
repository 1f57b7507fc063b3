"""A script that runs as a whole: `elastic run whole_script.py -- --kill 3` kills worker 1 in that step.

With `--idle 5` its code behind a body in the middle of step 3 takes 5 seconds.
"""

import os
import signal
import sys
import time

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import elastic


def option(name: str, otherwise: int) -> int:
    return int(sys.argv[sys.argv.index(name) + 1]) if name in sys.argv else otherwise


def main() -> int:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(torch.randn(256, 2), torch.randint(0, 3, (256,))), batch_size=64, shuffle=True)
    job = elastic.current_job()
    model, optimizer, loader = job.prepare(model, optimizer, loader, micro_batch_size=8, epochs=2)
    killed, idle, seen = option("--kill", -1), option("--idle", 0), 0
    for x, y in loader:
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loader.report is not None:
            seen = loader.report.step
            if seen == killed and job.worker == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        elif idle and seen == 2 and job.worker == 1:
            print("idle", flush=True)
            time.sleep(idle)
            idle = 0
    digest = loader.digest()
    if job.leader:
        print("digest", digest, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
