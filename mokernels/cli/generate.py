"""``mokernels generate``: load a checkpoint, make text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mokernels.demo.flow import quiet_transformers
from mokernels.demo.hub import local_folder
from mokernels.errors import ArgumentError
from mokernels.hf.auto import require_tokenizer

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: length of the answer at most.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that make up this share, in (0, 1].
        seed: of the random numbers.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``.

        Raises:
            ArgumentError: ``top_p`` is 0, or was given although nothing is sampled.
        """
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"--top-p is {self.top_p}, wanted a share above 0 and at most 1.")
        if self.temperature > 0:
            return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p,
                    "top_k": 0, "max_new_tokens": self.max_new_tokens}  # fmt: skip
        if self.top_p != 1:
            raise ArgumentError(
                "--top-p has no effect without sampling. Give a --temperature above 0 too."
            )
        # None: what the model's own generation_config says about sampling does not apply.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None,
                "max_new_tokens": self.max_new_tokens}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """Where and in which precision the model runs.

    Attributes:
        device: of the whole model.
        dtype: of what is not quantized, one of :data:`DTYPES`.
        activations: see :func:`mokernels.from_pretrained`.
        compile: whether its layers are compiled, and with CUDA graphs where there are any; None on
            a GPU, where that pays for itself at once.
    """

    device: str = "cpu"
    dtype: str = "auto"
    activations: str = "checkpoint"
    compile: bool | None = None


def generate(
    folder: Path,
    prompt: str,
    sampling: Sampling,
    place: Placement,
    *,
    tokenizer: str | None = None,
    chat: bool | None = None,
    stream: bool = False,
) -> str:
    """Load the checkpoint in ``folder`` and answer ``prompt``; returns the answer.

    Args:
        folder: the checkpoint.
        prompt: a message, or with ``chat=False`` a text to continue.
        sampling: how tokens are chosen.
        place: where the model runs.
        tokenizer: folder or hub name of another tokenizer than the folder's own.
        chat: whether to use the chat template; None where the tokenizer has one.
        stream: print the answer to stdout while it is made.

    Raises:
        ArgumentError: the options contradict each other, or there is no tokenizer.
        CheckpointError: the checkpoint is broken or is not ModelOpt's.
    """
    import torch

    import mokernels

    options = sampling.options()
    if place.dtype not in DTYPES:
        raise ArgumentError(f"--dtype is {place.dtype!r}, wanted one of {', '.join(DTYPES)}.")
    dtype = "auto" if place.dtype == "auto" else getattr(torch, place.dtype)
    words = load_tokenizer(folder, tokenizer)
    inputs = encode(words, prompt, chat)
    with quiet_transformers():
        model = mokernels.from_pretrained(
            folder, activations=place.activations, dtype=dtype, device_map=place.device
        )
    torch.manual_seed(sampling.seed)
    inputs = inputs.to(model.device)
    with torch.inference_mode(), quiet_transformers():
        output = mokernels.generate(
            model,
            inputs,
            compile="auto" if place.compile is None else place.compile,
            streamer=_streamer(words) if stream else None,
            **options,
        )
    answer: str = words.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


def load_tokenizer(folder: Path, other: str | None) -> Any:
    """The tokenizer of ``other`` if given, else of ``folder``.

    Raises:
        ArgumentError: the folder has none.
        HubError: ``other`` is neither a folder nor to be had.
    """
    place = folder if other is None else local_folder(other)
    require_tokenizer(place)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place)


def encode(tokenizer: Any, prompt: str, chat: bool | None) -> Any:
    """Token ids and mask [1, T] of the prompt.

    Raises:
        ArgumentError: the chat template was asked for and there is none.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise ArgumentError(
            "The tokenizer has no chat template. Leave --chat out to continue the text, or name "
            "the tokenizer of the instruction-tuned model with --tokenizer."
        )
    if template and chat is not False:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
