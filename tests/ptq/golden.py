"""What ModelOpt 0.47 exports of small models with known weights, as digests.

python -m tests.ptq.golden       (with nvidia-modelopt installed) writes the file anew
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.models import MIXTURES, tiny_model

FILE = Path(__file__).parents[1] / "data" / "modelopt_exports.json"
ARCHITECTURES = ("Llama", "Qwen2", "Qwen3")
PRESETS = {
    "FP8": "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "FP8_PB_WO": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "NVFP4": "NVFP4_DEFAULT_CFG",
    "MXFP8": "MXFP8_DEFAULT_CFG",
}

MIXED_CASES = [
    (architecture, format)
    for architecture in MIXTURES
    for format in PRESETS
    # Of these ModelOpt 0.47 writes the names in memory, having failed to find those of the hub.
    if (architecture, format) != ("Mixtral", "FP8_PB_WO")
]
"""Mixtures of experts whose exports are compared."""


def known_model(architecture: str, **options: object) -> nn.Module:
    """A tiny model whose weights do not depend on how transformers initialises them."""
    model = tiny_model(architecture, **options)
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(sorted(model.named_parameters())):
            numbers = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(numbers * 0.05 + (parameter.dim() == 1))
    return model


def batches() -> list[Tensor]:
    """Three batches of token ids."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    return [torch.randint(3, 128, (2, 16), generator=generator) for generator in generators]


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def modelopt_export(model: nn.Module, config: Mapping[str, object], folder: Path) -> nn.Module:
    """Let the real ModelOpt calibrate and export a model; returns it as it was calibrated."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    def loop(model: nn.Module) -> None:
        for ids in batches():
            model(input_ids=ids, use_cache=False)

    quantized = mtq.quantize(model, copy.deepcopy(config), loop)
    calibrated = copy.deepcopy(quantized)
    export_hf_checkpoint(quantized, export_dir=folder)
    return calibrated


def _entry(architecture: str, preset: str) -> dict[str, object]:
    import modelopt.torch.quantization as mtq

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = modelopt_export(known_model(architecture), getattr(mtq, preset), folder)
        amax = {
            name.removesuffix(".input_quantizer"): float(module.amax)
            for name, module in model.named_modules()
            if name.endswith(".input_quantizer") and module.is_enabled
            if module.amax is not None
        }
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "hf_quant_config.json").read_text())
    return {"amax": amax, "digest": digest(tensors.items()), "hf_quant_config": config}


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint but the scales of activations, which depend on the machine."""
    tensors = load_file(folder / "model.safetensors")
    return {name: t for name, t in tensors.items() if not name.endswith("input_scale")}


def _mixture_entry(architecture: str, preset: str) -> dict[str, object]:
    import modelopt.torch.quantization as mtq

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        modelopt_export(known_model(architecture), getattr(mtq, preset), folder)
        config = json.loads((folder / "hf_quant_config.json").read_text())
        return {"digest": digest(weights_of(folder).items()), "hf_quant_config": config}


def main() -> None:
    """Write the file."""
    entries = {
        f"{architecture} {format}": _entry(architecture, preset)
        for architecture in ARCHITECTURES
        for format, preset in PRESETS.items()
    }
    entries |= {
        f"{architecture} {format}": _mixture_entry(architecture, PRESETS[format])
        for architecture, format in MIXED_CASES
    }
    FILE.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
