"""Loading whatever is in a folder: a ModelOpt checkpoint or a plain model, and its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mokernels.checkpoint.files import checked_folder
from mokernels.errors import ArgumentError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_model(
    path_or_id: str | os.PathLike[str],
    *,
    activations: str = "checkpoint",
    dtype: Any = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model in eval mode: a ModelOpt checkpoint, or one that is not quantized.

    Args:
        path_or_id: a folder, or a repository of the Hugging Face hub.
        activations: see :func:`mokernels.from_pretrained`; a plain model has only the default.
        dtype: of what is not quantized.
        device_map: as in transformers.
        trust_remote_code: as in transformers.

    Raises:
        CheckpointError: there is no such folder, or the checkpoint is broken.
        ArgumentError: ``activations`` is given for a plain model, or does not fit the checkpoint.
    """
    from transformers import AutoConfig

    from mokernels.hf import folders, load, quantizer

    if looks_like_a_path(path_or_id):
        checked_folder(path_or_id)
    folders.install()
    quantizer.register()
    config = AutoConfig.from_pretrained(path_or_id, trust_remote_code=trust_remote_code)
    options = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
    if is_modelopt(config):
        return load.from_pretrained(path_or_id, activations=activations, **options).eval()
    if activations != "checkpoint":
        raise ArgumentError(
            f"activations={activations!r} is for ModelOpt checkpoints, and {str(path_or_id)!r} is "
            "none. Leave it out."
        )
    if trust_remote_code:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path_or_id, **options).eval()
    return load.model_class(config).from_pretrained(path_or_id, config=config, **options).eval()


def is_modelopt(config: Any) -> bool:
    """Whether a model's configuration says that ModelOpt quantized it."""
    from mokernels.hf.quantizer import METHODS, ModelOptConfig

    for holder in (config, config.get_text_config()):
        stated = getattr(holder, "quantization_config", None)
        if isinstance(stated, ModelOptConfig):
            return True
        if isinstance(stated, dict) and stated.get("quant_method") in METHODS:
            return True
    return False


def looks_like_a_path(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether this can be no name on the Hugging Face hub (``owner/name``), or exists here."""
    text = os.fspath(path_or_id)
    return os.path.lexists(text) or text.startswith((".", "/", "~")) or text.count("/") > 1


def load_tokenizer(
    path_or_id: str | os.PathLike[str],
    *,
    instead: str = "pass the original model as tokenizer=",
    trust_remote_code: bool = False,
) -> Any:
    """The tokenizer of a folder or of a repository of the hub.

    Raises:
        ArgumentError: the folder has none; ``instead`` is what the message advises.
    """
    if os.path.isdir(path_or_id):
        require_tokenizer(Path(path_or_id), instead=instead)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=trust_remote_code)


def require_tokenizer(
    folder: Path, *, instead: str = "name the original model with --tokenizer"
) -> None:
    """Raise ArgumentError if a folder holds no tokenizer; ``instead`` is what else to do."""
    if not any(os.path.isfile(folder / name) for name in TOKENIZER_FILES):
        advice = f", or {instead}" if instead else ""
        raise ArgumentError(
            f"The folder {str(folder)!r} holds no tokenizer (none of "
            f"{', '.join(TOKENIZER_FILES)}); ModelOpt's export_hf_checkpoint does not write one. "
            f"Copy the tokenizer's files of the original model there{advice}."
        )
