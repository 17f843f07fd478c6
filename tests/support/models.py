"""Tiny transformers models, and their export in ModelOpt's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from mokernels import numerics

INPUT_SCALE = {"FP8": 6.0 / 448, "NVFP4": 6.0 / (6 * 448)}
ALGORITHM = {"FP8_PB_WO": "fp8_pb_wo"}  # ModelOpt writes this one in lower case

SIZES = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.05,
}


_FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MIXTURES: dict[str, dict[str, object]] = {
    "Qwen3Moe": {"num_experts": 4, **_FEW},
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 64, **_FEW},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32, "v_head_dim": 32, **_FEW,
    },
}  # fmt: skip
"""Sizes of tiny mixtures of experts, by architecture."""


def tiny_model(
    architecture: str = "Llama", *, config: str = "", tied: bool = False, **sizes: object
) -> nn.Module:
    """A random causal language model of a few thousand weights, bf16, biases not zero.

    Args:
        architecture: of ``<architecture>ForCausalLM``.
        config: ``<config>Config`` is its configuration; the architecture's own name by default.
        tied: whether the output layer is the embedding.
        **sizes: of the configuration, instead of :data:`SIZES`.
    """
    config_class = getattr(transformers, f"{config or architecture}Config")
    own = MIXTURES.get(architecture, {})
    configuration = config_class(**{**SIZES, "tie_word_embeddings": tied, **own, **sizes})
    configuration.architectures = [f"{architecture}ForCausalLM"]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def quantized_tensors(format: str, weight: torch.Tensor, **scales: float) -> dict:
    """What a layer of ``format`` stores for a weight [N, K], by leaf name."""
    if format == "FP8":
        codes, scale = numerics.quantize_fp8_tensor_weight(weight)
    elif format == "FP8_PER_CHANNEL_PER_TOKEN":
        codes, scale = numerics.quantize_fp8_channel_weight(weight)
    elif format == "FP8_PB_WO":
        codes, scale = numerics.quantize_fp8_block_weight(weight)
    elif format == "MXFP8":
        codes, scale = numerics.quantize_mxfp8_weight(weight)
    else:
        codes, scale, scale_2 = numerics.quantize_nvfp4_weight(weight)
        scales = {"weight_scale_2": scale_2, **scales}
    if format in INPUT_SCALE:
        scales.setdefault("input_scale", torch.tensor(INPUT_SCALE[format]))
    return {"weight": codes, "weight_scale": scale, **scales}


def export(
    model: nn.Module,
    folder: Path,
    format: str,
    *,
    exclude: tuple[str, ...] = ("lm_head",),
    shards: int = 1,
    stated_in: tuple[str, ...] = ("config.json", "hf_quant_config.json"),
    keep_tensor: Callable[[str], bool] = lambda name: True,
    extra: dict[str, torch.Tensor] | None = None,
    same_codes: bool = False,
) -> Path:
    """Write ``model`` as ModelOpt would: every nn.Linear but the excluded ones quantized.

    Args:
        model: in bf16.
        folder: created.
        format: name of the algorithm.
        exclude: names of layers that stay as they are.
        shards: number of safetensors files.
        stated_in: which of the two JSON files mention the quantization.
        keep_tensor: leaves out the tensors for which it is false.
        extra: tensors to add.
        same_codes: quantize one weight of each shape and store it for all; quicker, where only
            the sizes matter.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors: dict[str, torch.Tensor] = {}
    by_shape: dict[torch.Size, dict] = {}
    tied = {id(p) for name, p in model.named_parameters() if "embed" in name}
    for name, value in model.state_dict(keep_vars=True).items():
        layer, _, leaf = name.rpartition(".")
        if layer in linear and layer not in exclude and leaf == "weight":
            if not same_codes or value.shape not in by_shape:
                by_shape[value.shape] = quantized_tensors(format, value.detach())
            stored = by_shape[value.shape]
            tensors |= {f"{layer}.{key}": tensor for key, tensor in stored.items()}
        elif not (layer == "lm_head" and id(value) in tied):
            tensors[name] = value.detach()
    tensors = {name: t for name, t in {**tensors, **(extra or {})}.items() if keep_tensor(name)}
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder, {n: t.contiguous().clone() for n, t in tensors.items()}, shards)
    algorithm = ALGORITHM.get(format, format)
    ignored = [*exclude, "model.embed_tokens"]
    config = model.config.to_dict()
    producer = {"name": "modelopt", "version": "0.47.0"}
    if "config.json" in stated_in:
        config["quantization_config"] = {
            "ignore": ignored,
            "quant_algo": algorithm,
            "producer": producer,
            "quant_method": "modelopt",
        }
    (folder / "config.json").write_text(json.dumps(config))
    if "hf_quant_config.json" in stated_in:
        quantization = {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": None,
            "exclude_modules": ignored,
        }
        text = json.dumps({"producer": producer, "quantization": quantization})
        (folder / "hf_quant_config.json").write_text(text)
    return folder


def _write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
