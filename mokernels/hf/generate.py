"""``mokernels.generate``: compiled layers and CUDA graphs under transformers' own ``generate``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mokernels.compile.step import CudaGraphs
from mokernels.errors import ArgumentError
from mokernels.hf.decoding import generate_with, release
from mokernels.hf.obstacles import to_capture, to_static_cache
from mokernels.hf.options import setting
from mokernels.hf.static_cache import rounded_length

__all__ = ["generate", "release"]

logger = logging.getLogger("mokernels")

_COMPILED = ("cuda", "xpu")  # device types on which a compilation pays for itself in one answer


@dataclass(frozen=True)
class Plan:
    """How a generation runs.

    Attributes:
        compile: whether the decoder layers are compiled.
        cuda_graphs: whether steps of one token are captured and replayed.
    """

    compile: bool
    cuda_graphs: bool


def generate(
    model: Any,
    inputs: Tensor | Mapping[str, Any],
    *,
    compile: bool | str = "auto",
    cuda_graphs: bool | str = "auto",
    max_cache_len: int | None = None,
    **options: Any,
) -> Any:
    """Generate with a transformers model: its own ``generate``, compiled and replayed.

    The decoder layers are compiled once for prompts of any length and once for single tokens (one
    row and several rows count apart), and on a GPU a whole step of one token is a CUDA graph. Keys
    and values are in a static cache that is kept for the next call, with all that was compiled and
    captured, until the model or :func:`mokernels.release` frees it; two sizes are kept. Its length
    is rounded up to a power of two, at least 256, so that prompts of different lengths share it; a
    size that is new is captured anew. Between calls the model is as it was.

    Args:
        model: a decoder of transformers, quantized or not.
        inputs: token ids [B, T], int64; or what a tokenizer returns, a mapping with ``input_ids``
            and ``attention_mask`` [B, T]. Shorter rows are padded on the left.
        compile: ``"auto"`` compiles on a GPU, where it pays for itself at once, if the options
            allow for a static cache; True insists; False leaves the layers as they are.
        cuda_graphs: ``"auto"`` uses them where the layers are compiled and the device has them;
            True insists, with compiled layers or without.
        max_cache_len: tokens of the static cache, prompt and answer, in place of the rounded
            length: for a service whose longest request is known.
        **options: passed on to the model's ``generate`` (``max_new_tokens``, ``do_sample``,
            ``streamer``, ``stopping_criteria``, ...).

    Returns:
        What the model's ``generate`` returns: token ids [B, T + new], or with
        ``return_dict_in_generate=True`` its output object, whose cache is then the caller's.

    Raises:
        ArgumentError: the arguments contradict each other; what was insisted on cannot be done
            with this model, device or option; or ``max_cache_len`` is too small.
    """
    arguments = _arguments(inputs, options)
    plan = choose_plan(model, arguments, compile, cuda_graphs)
    if not (plan.compile or plan.cuda_graphs):
        return model.generate(**arguments)
    arguments.pop("cache_implementation", None)
    arguments.pop("disable_compile", None)
    capture = CudaGraphs(model.device) if plan.cuda_graphs else None
    size = cache_size(model, arguments, max_cache_len)
    return generate_with(model, arguments, size, compile=plan.compile, capture=capture)


def choose_plan(
    model: Any, arguments: Mapping[str, Any], compile: bool | str, cuda_graphs: bool | str
) -> Plan:
    """How to generate; what "auto" chose is logged.

    Args:
        model: see :func:`generate`.
        arguments: of the model's ``generate``.
        compile, cuda_graphs: see :func:`generate`.

    Raises:
        ArgumentError: see :func:`generate`.
    """
    for name, choice in (("compile", compile), ("cuda_graphs", cuda_graphs)):
        if choice not in (True, False, "auto"):
            raise ArgumentError(f"{name} is {choice!r}, wanted True, False or 'auto'.")
    reason = to_static_cache(model, arguments)
    _insist("compile", compile, reason)
    _insist("cuda_graphs", cuda_graphs, reason)
    if reason:
        if compile == "auto" and model.device.type in _COMPILED:
            logger.warning("generate runs uncompiled: %s.", reason)
        return Plan(False, False)
    compiled = model.device.type in _COMPILED if compile == "auto" else bool(compile)
    reason = to_capture(model, compiled)
    _insist("cuda_graphs", cuda_graphs, reason)
    captured = compiled and reason is None if cuda_graphs == "auto" else bool(cuda_graphs)
    if compiled and reason and cuda_graphs == "auto":
        logger.info("generate runs without CUDA graphs: %s.", reason)
    logger.info("generate: compiled layers %s, CUDA graphs %s.", compiled, captured)
    return Plan(compiled, captured)


def cache_size(
    model: Any, arguments: Mapping[str, Any], max_cache_len: int | None
) -> tuple[int, int]:
    """Rows and tokens of the static cache.

    Raises:
        ArgumentError: ``max_cache_len`` is too small for the prompt and the longest answer.
    """
    prompt = _prompt(arguments)
    rows = prompt.shape[0] * (setting(model, arguments, "num_return_sequences") or 1)
    new, total = (setting(model, arguments, name) for name in ("max_new_tokens", "max_length"))
    # transformers' own default is 20 new tokens.
    needed = prompt.shape[1] + (20 if new is None else new)
    if new is None and total is not None:
        needed = max(total, prompt.shape[1] + 1)
    if max_cache_len is not None and max_cache_len < needed:
        raise ArgumentError(
            f"max_cache_len is {max_cache_len}, but a prompt of {prompt.shape[1]} tokens and the "
            f"longest answer to it make {needed}. Give that many or more, or a smaller "
            "max_new_tokens."
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return rows, max_cache_len or rounded_length(needed, longest)


def _insist(name: str, choice: bool | str, reason: str | None) -> None:
    if choice is True and reason:
        raise ArgumentError(
            f"mokernels.generate cannot obey {name}=True: {reason}. Change that, or pass "
            f"{name}='auto', which goes without."
        )


def _arguments(inputs: Tensor | Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the model's ``generate``."""
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(given, Mapping):
        raise ArgumentError(
            f"inputs is a {type(inputs).__name__}, wanted token ids [B, T] as a tensor, or the "
            "mapping of tensors that a tokenizer returns with return_tensors='pt'."
        )
    twice = sorted(given.keys() & options.keys())
    if twice:
        raise ArgumentError(
            f"{', '.join(twice)} was given in inputs and as an option. Give it once."
        )
    arguments = {**given, **options}
    _prompt(arguments)
    return arguments


def _prompt(arguments: Mapping[str, Any]) -> Tensor:
    """The tensor [B, T, ...] that holds the prompt."""
    embedded = arguments.get("inputs_embeds")
    prompt = arguments.get("input_ids") if embedded is None else embedded
    if not isinstance(prompt, Tensor) or prompt.dim() < 2:
        found = list(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
        raise ArgumentError(
            f"The prompt (input_ids) is {found}, wanted a tensor [B, T] of token ids; a tokenizer "
            "makes it with return_tensors='pt'."
        )
    return prompt
