"""Small models of transformers, by name, with random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch

WORDS = 64
_PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": WORDS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": WORDS, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
_OPT = {"word_embed_proj_dim": 16, "ffn_dim": 64}
_DISTIL = {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, "vocab_size": WORDS, "max_position_embeddings": 32}
_IMAGE = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "llama-classes": ("LlamaForSequenceClassification", "LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 2}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GROUPED, "sliding_window": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "num_hidden_layers": 7, "sliding_window": 4}),
    "phi": ("PhiForCausalLM", "PhiConfig", _PLAIN),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_PLAIN, **_OPT}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _PLAIN),
    "bert": ("BertForMaskedLM", "BertConfig", _PLAIN),
    "bert-classes": ("BertForSequenceClassification", "BertConfig", _PLAIN),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _PLAIN),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", _DISTIL),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", {**_PLAIN, "local_attention": 4}),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**_PLAIN, "embedding_size": 16}),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", _PLAIN),
    "deberta": ("DebertaV2ForMaskedLM", "DebertaV2Config", {**_PLAIN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGE),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _IMAGE),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {k: v for k, v in _IMAGE.items() if k != "intermediate_size"}),
}


def build(kind: str, **changes: Any) -> Any:
    """Returns a model; `changes` are settings of its configuration."""
    import transformers  # pyright: ignore[reportMissingImports]

    name, config, settings = KINDS[kind]
    torch.manual_seed(1)
    return getattr(transformers, name)(getattr(transformers, config)(**{**settings, **changes}))


def with_lora(model: Any, **settings: Any) -> Any:
    """Adds adapters to all linear layers but the head."""
    import peft  # pyright: ignore[reportMissingImports]

    torch.manual_seed(2)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False, **settings))


def tokens(seed: int, samples: int = 2, length: int = 8, *, padded: bool = True) -> dict[str, torch.Tensor]:
    """Token ids with labels, and a mask that pads the last sample."""
    ids = torch.randint(3, WORDS, (samples, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
