"""Loads a checkpoint into vLLM's own model, without a GPU, and compares each tensor with the files.

Run in a process of its own: ``python -m tests.support.vllm_load FOLDER``. vLLM reads the
configuration, builds its fused layers and its loaders put the tensors there; no kernel is chosen,
since those need a GPU. Prints what vLLM made of the configuration, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
SCALES_OF_CACHE = {
    "self_attn.attn.k_scale": "self_attn.k_proj.k_scale",
    "self_attn.attn.v_scale": "self_attn.v_proj.v_scale",
}


def main(folder: Path) -> dict[str, Any]:
    os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    # Each needs vLLM's environment to be set first.
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.model_loader.utils import initialize_model

    no_kernel = SimpleNamespace(input_quant_key=lambda: None)
    modelopt.select_linear_kernel = lambda *args, **kwargs: no_kernel
    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=64,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, (folder / "store").as_uri(), 0, "gloo")
        initialize_model_parallel(1, 1)
        model = initialize_model(config)
        stored = load_file(folder / "model.safetensors")
        model.load_weights(stored.items())
    compared = compare(dict(model.named_parameters()), dict(stored))
    quantization = config.quant_config
    return {
        "method": config.model_config.quantization,
        "algorithm": quantization.quant_method,
        "kv_cache": getattr(quantization, "kv_cache_quant_method", None)
        or getattr(quantization, "kv_cache_quant_algo", None),
        "excluded": quantization.exclude_modules,
        "compared": compared,
    }


def compare(parameters: dict[str, Tensor], stored: dict[str, Tensor]) -> int:
    """How many parameters of the layers hold the very bits of the files; raises if one does not."""
    compared = 0
    for name, parameter in parameters.items():
        if ".layers." not in name:
            continue
        sources = sources_of(name, stored)
        if not sources:
            assert ".attn." in name, f"nothing in the files for {name}"
            continue
        expected = torch.cat([raw(stored[source]) for source in sources])
        found = raw(parameter.data)
        assert torch.equal(found, expected), f"{name}: {found.shape}, {expected.shape} or the bits"
        compared += 1
    return compared


def sources_of(name: str, stored: dict[str, Tensor]) -> list[str]:
    """Names in the files of what vLLM keeps under ``name``, in order."""
    for fused, parts in FUSED.items():
        if fused in name:
            return [name.replace(fused, part) for part in parts]
    for ours, theirs in SCALES_OF_CACHE.items():
        name = name.replace(ours, theirs)
    return [name] if name in stored else []


def raw(tensor: Tensor) -> Tensor:
    """Its bytes, row after row. Norms are widened to fp32 by some versions of vLLM."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.contiguous().reshape(-1).view(torch.uint8)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))) + "\n")
