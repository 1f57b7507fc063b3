"""Fine-tunes low-rank adapters of a language model in plain PyTorch; `lora.py` does it on elastic workers."""

import peft
import torch
from finetune_torch import build, held_out_loss, padded, texts
from torch.utils.data import DataLoader


def main() -> None:
    torch.manual_seed(1)
    model = peft.get_peft_model(build(), peft.LoraConfig(r=8, lora_alpha=32, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    loader = DataLoader(texts(384, seed=1), batch_size=32, shuffle=True, collate_fn=padded)

    for epoch in range(4):
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: loss {held_out_loss(model):.3f}")


if __name__ == "__main__":
    main()
