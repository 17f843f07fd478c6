"""Folders that hold only hf_quant_config.json, and folders that say nothing at all.

transformers reads config.json alone. A ModelOpt export whose quantization is described only in
hf_quant_config.json would load as if its codes were weights, without an error. So the quantization
is added to the configuration as transformers reads it, and our quantizer takes over from there.
"""

from __future__ import annotations

import os
from functools import wraps
from pathlib import Path
from typing import Any

from mokernels.checkpoint import (
    QUANT_CONFIG_FILE,
    looks_quantized,
    parse_quantization_file,
)

_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def install() -> None:
    """Make ``PreTrainedConfig.get_config_dict`` add what hf_quant_config.json says."""
    from transformers.configuration_utils import PreTrainedConfig

    original = PreTrainedConfig.get_config_dict.__func__
    if getattr(original, "reads_hf_quant_config", False):
        return

    @wraps(original)
    def get_config_dict(
        cls: type, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config, unused = original(cls, pretrained_model_name_or_path, **kwargs)
        if config and not kwargs.get("gguf_file"):
            add_quantization(config, pretrained_model_name_or_path, kwargs)
        return config, unused

    get_config_dict.reads_hf_quant_config = True  # type: ignore[attr-defined]
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[arg-type]


def add_quantization(
    config: dict[str, Any], path_or_id: str | os.PathLike[str], options: dict[str, Any]
) -> None:
    """Put a ``quantization_config`` into a configuration that should have one.

    Args:
        config: contents of config.json; changed in place.
        path_or_id: the folder or hub id that it came from.
        options: download options as given to ``from_pretrained``.
    """
    stated = config.get("quantization_config") or (config.get("text_config") or {}).get(
        "quantization_config"
    )
    if stated and not str(stated.get("quant_method", "")).startswith("modelopt"):
        return
    # Looked up even when config.json has it: the file wins, and must be beside the weights.
    file = quantization_file(path_or_id, options)
    if stated:
        return
    folder = Path(path_or_id, options.get("subfolder") or "")
    if file is not None:
        config["quantization_config"] = parse_quantization_file(file)
    elif folder.is_dir() and looks_quantized(folder):
        # Scales without a word about them: the audit refuses the folder and says why.
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": None}


def quantization_file(path_or_id: str | os.PathLike[str], options: dict[str, Any]) -> Path | None:
    """Path of hf_quant_config.json of a folder or hub id, or None where there is none."""
    subfolder = options.get("subfolder") or ""
    if os.path.isdir(path_or_id):
        file = Path(path_or_id, subfolder, QUANT_CONFIG_FILE)
        return file if os.path.lexists(file) else None
    if os.path.exists(path_or_id):  # a single configuration file
        return None
    from transformers.utils.hub import cached_file

    found = cached_file(
        str(path_or_id),
        QUANT_CONFIG_FILE,
        subfolder=subfolder,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **{name: options[name] for name in _DOWNLOAD_OPTIONS if name in options},
    )
    return None if found is None else Path(found)
