"""Fine-tunes low-rank adapters on elastic workers: `lora_torch.py` with a few lines changed, which docs/dropin.md shows."""

import peft
import torch
from finetune_torch import build, held_out_loss, padded, texts
from torch.utils.data import DataLoader

import elastic


def main(job: elastic.Job) -> str | None:
    torch.manual_seed(1)
    model = peft.get_peft_model(build(), peft.LoraConfig(r=8, lora_alpha=32, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    loader = DataLoader(texts(384, seed=1), batch_size=32, shuffle=True, collate_fn=padded)
    model, optimizer, loader = job.prepare(model, optimizer, loader, micro_batch_size=4)

    for epoch in loader.epochs(4):
        for batch in loader:
            loss = job.weighted(model(**batch).loss, (batch["labels"][:, 1:] != -100).sum())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if job.leader:
            print(f"epoch {epoch}: loss {held_out_loss(model):.3f}")
    return loader.digest()


if __name__ == "__main__":
    elastic.run(main, workers=3)
