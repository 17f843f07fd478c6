"""Tiny vision-language models of transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import nn

from tests.support.models import SIZES

TEXT = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
SIGHT = {"hidden_size": 32, "intermediate_size": 64}
CLIP = {**SIGHT, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
QWEN = {**SIGHT, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
TOKENS = {"image_token_id": 100, "video_token_id": 101}
TOKENS |= {"vision_start_token_id": 102, "vision_end_token_id": 103}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def _qwen25() -> nn.Module:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**QWEN, "fullatt_block_indexes": [0]},
        **TOKENS,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_mixture() -> nn.Module:
    config = transformers.Qwen3VLMoeConfig(
        text_config={**TEXT, **EXPERTS, "rope_parameters": ROPE},
        vision_config={**QWEN, "deepstack_visual_indexes": [0]},
        **TOKENS,
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config=TEXT,
        vision_config={**CLIP, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=100,
        boi_token_index=101,
        eoi_token_index=102,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**CLIP, patch_size=14),
        image_token_index=100,
    )
    return transformers.LlavaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Qwen2_5_VL": _qwen25,
    "Qwen3VLMoe": _qwen3_mixture,
    "Gemma3": _gemma3,
    "Llava": _llava,
}


def known_vision_model(architecture: str) -> nn.Module:
    """A tiny model whose weights do not depend on how transformers initialises them, bf16."""
    model = MODELS[architecture]()
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(sorted(model.named_parameters())):
            numbers = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(numbers * 0.05 + (parameter.dim() == 1))
    return model.eval()


def batches() -> list[torch.Tensor]:
    """Three batches of token ids, none of them that of an image."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    return [torch.randint(3, 99, (2, 16), generator=generator) for generator in generators]


def see(model: nn.Module) -> None:
    """Call the model on every batch."""
    for ids in batches():
        model(input_ids=ids, use_cache=False)
