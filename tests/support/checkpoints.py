"""Tiny checkpoints in any format, and the means to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mokernels.checkpoint import Report, quantize_weight, write_checkpoint
from mokernels.errors import CheckpointError, Finding
from mokernels.formats import FORMATS, Format

FORMAT_NAMES = tuple(FORMATS)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Linear:
    """A layer to make: ``n`` outputs, ``k`` inputs."""

    name: str
    n: int = 32
    k: int = 64
    bias: bool = False


TINY = (
    Linear("model.layers.0.self_attn.q_proj", 64, 64, bias=True),
    Linear("model.layers.0.self_attn.k_proj", 32, 64),
    Linear("model.layers.0.self_attn.v_proj", 32, 64),
    Linear("model.layers.0.mlp.up_proj", 160, 64),
    Linear("model.layers.0.mlp.down_proj", 64, 160),
)
"""Layers that every format can take; up_proj is more than one block of 128 high."""

EXCLUDE = ("lm_head", "model.embed_tokens")
MODEL_CONFIG: Mapping[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def plain_tensors(seed: int = 0) -> dict[str, Tensor]:
    """What a model has beside its linear layers, in bf16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (48, 64), "lm_head.weight": (48, 64)}
    tensors = {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()
    }
    return tensors | {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}


def layer_tensors(
    layer: Linear, format: Format, *, input_scale: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """Tensors of one quantized layer by full name, from random bf16 weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(layer.n, layer.k, generator=generator).bfloat16()
    scale = 0.0125 * (1 + seed) if format.input_scale and input_scale else None
    stored = quantize_weight(format, weight, input_scale=scale)
    if layer.bias:
        stored["bias"] = torch.randn(layer.n, generator=generator).bfloat16()
    return {f"{layer.name}.{leaf}": tensor for leaf, tensor in stored.items()}


def make_checkpoint(
    folder: Path,
    format: str | Mapping[str, str] = "FP8",
    layers: Sequence[Linear] = TINY,
    *,
    plain: Mapping[str, Tensor] | None = None,
    exclude: Sequence[str] = EXCLUDE,
    layout: Literal["both", "hf_quant_config", "config"] = "both",
    input_scales: bool = True,
    kv_cache: str | None = None,
    config: Mapping[str, Any] = MODEL_CONFIG,
    max_shard_size: int = 1 << 30,
) -> Path:
    """Write a valid checkpoint and return its folder.

    Args:
        folder: to create.
        format: name of the format of ``layers``, or one for each last part of their names.
        layers: the quantized linear layers.
        plain: the other tensors; an embedding, a head and a norm when None.
        exclude: patterns of modules that are not quantized.
        layout: which of the JSON files describe the quantization.
        input_scales: whether FP8 layers have an input_scale.
        kv_cache: algorithm of the KV cache; "FP8" adds scales to every k_proj and v_proj.
        config: content of config.json.
        max_shard_size: in bytes.
    """
    rows = {
        layer.name: FORMATS[format if isinstance(format, str) else format[_kind(layer)]]
        for layer in layers
    }
    tensors: dict[str, Tensor] = dict(plain_tensors() if plain is None else plain)
    for seed, layer in enumerate(layers):
        tensors |= layer_tensors(layer, rows[layer.name], input_scale=input_scales, seed=seed)
        kind = _kind(layer)
        if kv_cache and kind in ("k_proj", "v_proj"):
            tensors[f"{layer.name}.{kind[0]}_scale"] = torch.tensor(0.5 + seed)
    write_checkpoint(
        folder,
        tensors,
        config,
        FORMATS[format] if isinstance(format, str) else rows,
        exclude=exclude,
        kv_cache=kv_cache,
        max_shard_size=max_shard_size,
        verify=False,
    )
    if layout == "config":
        (folder / "hf_quant_config.json").unlink()
    elif layout == "hf_quant_config":
        edit_json(folder / "config.json", lambda data: data.pop("quantization_config"))
    return folder


def _kind(layer: Linear) -> str:
    return layer.name.rpartition(".")[2]


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of a JSON file."""
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(folder / SINGLE)
    # Clones: the loaded ones are views of the file that is about to be replaced.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(path: Path, header: object, data: bytes, *, length: int | None = None) -> None:
    """Write a safetensors file as it is told to: ``header`` may be bytes, ``length`` may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)


def only_finding(source: Report | CheckpointError, rule: str) -> Finding:
    """The one finding of a rule; there must be no error of another rule."""
    findings = source.findings
    assert [finding.rule for finding in findings] == [rule], "\n".join(map(str, findings))
    return findings[0]
