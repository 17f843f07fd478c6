"""``mokernels.from_pretrained``."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import transformers
import transformers.quantizers.auto  # before our quantizer: the hook calls that once it is loaded
from transformers import AutoConfig, AutoModelForCausalLM

from mokernels.checkpoint import open_checkpoint
from mokernels.errors import CheckpointError, Finding
from mokernels.hf import folders, quantizer
from mokernels.hf.quantizer import ModelOptConfig
from mokernels.layers import check_activation_choice

__all__ = ["ModelOptConfig", "from_pretrained"]

_CONFIG_OPTIONS = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    activations: str = "checkpoint",
    dtype: Any = "auto",
    device_map: Any = None,
    **options: Any,
) -> Any:
    """Load a ModelOpt checkpoint as a transformers model.

    The same as ``AutoModelForCausalLM.from_pretrained`` after ``import mokernels``, with the class
    that config.json names, and with a choice of what happens to the activations.

    Args:
        path_or_id: a folder, or a repository of the Hugging Face hub.
        activations: ``"checkpoint"`` quantizes them as the checkpoint asks for; ``"16bit"`` leaves
            them alone (weight-only); ``"fp8_block"``, for FP8_PB_WO alone, quantizes them to E4M3
            in 1x128 blocks, as vLLM does.
        dtype: of everything that is not quantized, as in transformers; ``"auto"`` is the
            checkpoint's own.
        device_map: as in transformers (accelerate): ``"cuda"``, ``"auto"``, a dict with CPU and
            disk offload, ...
        **options: passed on to the model class's ``from_pretrained``.

    Returns:
        The model in eval mode (and the loading information, with ``output_loading_info=True``).

    Raises:
        CheckpointError: the checkpoint is broken, contradictory or not a ModelOpt one; every
            problem is listed.
        ArgumentError: ``activations`` is unknown or does not fit the checkpoint's format.
    """
    check_activation_choice(activations)
    folders.install()
    quantizer.register()
    if os.path.isdir(path_or_id):
        # Before transformers opens any of them: are these the files they seem to be?
        open_checkpoint(Path(path_or_id, options.get("subfolder") or "")).close()
    config = copy.deepcopy(options.pop("config", None))
    if config is None:
        chosen = {name: options[name] for name in _CONFIG_OPTIONS if name in options}
        config = AutoConfig.from_pretrained(path_or_id, **chosen)
    _choose_activations(config, path_or_id, activations)
    return model_class(config).from_pretrained(
        path_or_id, config=config, dtype=dtype, device_map=device_map, **options
    )


def _choose_activations(config: Any, path_or_id: object, activations: str) -> None:
    holder = config
    if getattr(config, "quantization_config", None) is None:
        holder = config.get_text_config()
    stated = getattr(holder, "quantization_config", None) or {}
    method = stated.get("quant_method") if isinstance(stated, dict) else type(stated).__name__
    if isinstance(stated, ModelOptConfig):
        stated.activations = activations
    elif method in quantizer.METHODS:
        holder.quantization_config = {**stated, "activations": activations}
    else:
        raise CheckpointError(
            path_or_id,
            [
                Finding(
                    "not-modelopt",
                    "this is not a ModelOpt checkpoint",
                    found=f"quant_method {method!r}" if stated else "no quantization configuration",
                    wanted="hf_quant_config.json, or quant_method 'modelopt' in config.json",
                    remedy="Load it with transformers itself.",
                    file="config.json",
                )
            ],
        )


def model_class(config: Any) -> Any:
    """The class that config.json names, or the causal language model of its type."""
    for name in getattr(config, "architectures", None) or ():
        model_class = getattr(transformers, name, None)
        if model_class is not None:
            return model_class
    return AutoModelForCausalLM
