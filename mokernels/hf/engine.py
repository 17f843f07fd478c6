"""Options of ``LLM`` that say how a model runs, under the names that they have in vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mokernels.errors import ArgumentError


@dataclass(frozen=True)
class Engine:
    """How answers are made.

    Attributes:
        max_num_seqs: answers that are made at the same time.
        max_model_len: tokens of a prompt and its answer; None for as many as the model has
            positions.
        gpu_memory_utilization: share of the device's free memory that continuous batching takes for
            its cache; None leaves it to transformers.
        enforce_eager: neither compile nor capture.
    """

    max_num_seqs: int = 64
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        share, longest = self.gpu_memory_utilization, self.max_model_len
        rules = (
            ("max_num_seqs", self.max_num_seqs >= 1, "at least 1"),
            ("max_model_len", longest is None or longest >= 2, "at least 2, or None"),
            (
                "gpu_memory_utilization",
                share is None or 0 < share <= 1,
                "a share above 0 and at most 1, or None",
            ),
        )
        for name, fits, wanted in rules:
            if not fits:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}, wanted {wanted}.")

    def positions(self, model: Any) -> int:
        """Tokens that a prompt and its answer may have together."""
        own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return min(own or 1 << 31, self.max_model_len or 1 << 31)


def check_parallelism(tensor_parallel_size: int) -> None:
    """One process holds one model.

    Raises:
        ArgumentError: several are asked for.
    """
    if tensor_parallel_size != 1:
        raise ArgumentError(
            f"tensor_parallel_size is {tensor_parallel_size}, wanted 1: an LLM is one process. To "
            "split a model, start torchrun and load it by from_pretrained(..., tp_plan='auto'), or "
            "spread its layers over the GPUs of this process by device_map='auto'."
        )


def check_quantization(quantization: str | None, found: bool, model: object) -> None:
    """Users of vLLM name the kind of checkpoint; here the checkpoint does.

    Args:
        quantization: None, or one of vLLM's names for ModelOpt's checkpoints.
        found: whether the checkpoint is one of ModelOpt's.
        model: its name.

    Raises:
        ArgumentError: another quantization is asked for, or there is none in the checkpoint.
    """
    if quantization is None:
        return
    if not quantization.startswith("modelopt"):
        raise ArgumentError(
            f"quantization is {quantization!r}, wanted 'modelopt', or None: the checkpoint says "
            "the rest."
        )
    if not found:
        raise ArgumentError(
            f"quantization={quantization!r} was given, but {str(model)!r} holds no checkpoint of "
            "ModelOpt's. Leave it out to load the model as it is, or quantize it first "
            "(mokernels quantize)."
        )
