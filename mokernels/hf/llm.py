"""Offline generation: many prompts at once, in the few lines that vLLM's users know."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mokernels.errors import ArgumentError
from mokernels.hf.answers import Answer
from mokernels.hf.auto import is_modelopt, load_model, load_tokenizer
from mokernels.hf.continuous import answer_continuously, obstacle
from mokernels.hf.engine import Engine, check_parallelism, check_quantization
from mokernels.hf.padded import answer_padded
from mokernels.hf.sampling import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class CompletionOutput:
    """One answer.

    Attributes:
        index: among the answers to its prompt.
        text: without the end token, and cut before the stop text.
        token_ids: all tokens that were made, the one that ended the answer included.
        finish_reason: ``"stop"`` (an end token or a stop text) or ``"length"``.
        stop_reason: the stop text or the token of ``stop_token_ids``; None for the model's own end.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """The answers to one prompt.

    Attributes:
        request_id: its place among the prompts, as a string.
        prompt: the text; None for a prompt of token ids.
        prompt_token_ids: what the model was given.
        outputs: ``n`` answers.
        finished: always True.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    """A model and its tokenizer, for batches of prompts.

    Requests go through transformers' continuous batching on a GPU, where it treats them exactly: no
    seed, no ``min_p``, no penalties. Everything else, and everything on a CPU, goes through
    :func:`mokernels.generate` in batches padded on the left, in which every row has its own
    parameters and random numbers. Both give a greedy answer the tokens that it has alone, up to
    rounding, which depends on what else is in the batch; see :func:`mokernels.batch_invariant`.

    Args:
        model: folder or hub name of a ModelOpt checkpoint, or of a plain model.
        tokenizer: folder or hub name of another tokenizer than the model's own.
        activations: see :func:`mokernels.from_pretrained`.
        dtype: of what is not quantized, as in transformers.
        device_map: as in transformers; ``"auto"`` takes the GPUs there are.
        trust_remote_code: as in transformers.
        continuous_batching: ``"auto"`` as above; True insists, False never.
        max_num_seqs: answers that are made at the same time.
        max_model_len: tokens of a prompt and its answer at most, if fewer than the model's.
        gpu_memory_utilization: share of the free memory that continuous batching's cache takes.
        enforce_eager: neither compile nor capture.
        seed: for torch's global generator, from which answers without a seed draw theirs.
        quantization: None, or "modelopt" and its variants, as vLLM's users write it; what the
            format is, the checkpoint says.
        tensor_parallel_size: 1.

    Attributes:
        model: the loaded model.
        tokenizer: the loaded tokenizer.

    Raises:
        CheckpointError: there is no such folder, or the checkpoint is broken.
        ArgumentError: there is no tokenizer, or an option is none of those named above.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        activations: str = "checkpoint",
        dtype: Any = "auto",
        device_map: Any = "auto",
        trust_remote_code: bool = False,
        continuous_batching: bool | str = "auto",
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        gpu_memory_utilization: float | None = None,
        enforce_eager: bool = False,
        seed: int | None = None,
        quantization: str | None = None,
        tensor_parallel_size: int = 1,
    ) -> None:
        if continuous_batching not in (True, False, "auto"):
            raise ArgumentError(
                f"continuous_batching is {continuous_batching!r}, wanted True, False or 'auto'."
            )
        check_parallelism(tensor_parallel_size)
        check_quantization(quantization, True, model)
        self._engine = Engine(max_num_seqs, max_model_len, gpu_memory_utilization, enforce_eager)
        self._continuous = continuous_batching
        if seed is not None:
            torch.manual_seed(seed)
        here = tokenizer is not None or os.path.isdir(model)
        if here:  # before the weights, which take long
            self.tokenizer = load_tokenizer(tokenizer or model, trust_remote_code=trust_remote_code)
        self.model = load_model(
            model,
            activations=activations,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )
        check_quantization(quantization, is_modelopt(self.model.config), model)
        if not here:
            self.tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)

    def get_tokenizer(self) -> Any:
        """The tokenizer."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends; used where none are given."""
        own = self.model.generation_config
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        values = {name: getattr(own, name, None) for name in names}
        given = {name: value for name, value in values.items() if value is not None}
        longest = getattr(own, "max_new_tokens", None)
        return SamplingParams(**given, **({"max_tokens": longest} if longest else {}))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue texts.

        Args:
            prompts: texts, lists of token ids, or dicts with ``prompt`` or ``prompt_token_ids``;
                or one of these.
            sampling_params: for all prompts, or one for each; the model's own recommendation, if
                None.
            use_tqdm: show a progress bar.

        Returns:
            The answers, in the order of the prompts.

        Raises:
            ArgumentError: a prompt is empty or longer than the model's positions, or the numbers of
                prompts and parameters differ; or continuous batching was insisted on and would not
                be exact.
            BackendError: transformers' continuous batching failed.
        """
        texts = [self._encoded(prompt) for prompt in _listed(prompts)]
        return self._answer(texts, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, through the tokenizer's chat template.

        Args:
            messages: one conversation or several, each a list of dicts with ``role`` and
                ``content``.
            sampling_params, use_tqdm: as in :meth:`generate`.
            chat_template: another template than the tokenizer's own.
            add_generation_prompt: let the template begin the assistant's message.
            chat_template_kwargs: further variables of the template.

        Raises:
            ArgumentError: as :meth:`generate`, or there is no chat template.
        """
        if not (chat_template or getattr(self.tokenizer, "chat_template", None)):
            raise ArgumentError(
                "The tokenizer has no chat template. Pass chat_template=, or use generate() to "
                "continue a text."
            )
        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        options: dict[str, Any] = {**(chat_template_kwargs or {}), "chat_template": chat_template}
        options["add_generation_prompt"] = add_generation_prompt
        texts = []
        for conversation in many:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False, **options)
            texts.append((text, self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        return self._answer(texts, sampling_params, use_tqdm)

    def _encoded(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            return self._encoded_fields(prompt)
        if isinstance(prompt, str):
            return prompt, self.tokenizer(prompt)["input_ids"]
        return None, list(prompt)

    def _encoded_fields(self, prompt: Mapping[str, Any]) -> tuple[str | None, list[int]]:
        if "prompt_token_ids" in prompt:
            return prompt.get("prompt"), list(prompt["prompt_token_ids"])
        if "prompt" not in prompt:
            raise ArgumentError(
                f"A prompt is a dict with {', '.join(map(repr, prompt)) or 'nothing'}, wanted "
                "'prompt' or 'prompt_token_ids'."
            )
        return self._encoded(prompt["prompt"])

    def _answer(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        show: bool,
    ) -> list[RequestOutput]:
        if params is None:
            params = self.get_default_sampling_params()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ArgumentError(
                f"There are {len(prompts)} prompts and {len(each)} sampling parameters. Give one "
                "SamplingParams for all, or one for each."
            )
        answers = [
            [self._new_answer(ids, choice, number) for number in range(choice.n)]
            for (_, ids), choice in zip(prompts, each, strict=True)
        ]
        with _progress(sum(map(len, answers)), show) as finished:
            self._run([answer for row in answers for answer in row], finished)
        return [
            RequestOutput(str(place), text, ids, [_output(*pair) for pair in enumerate(row)])
            for place, ((text, ids), row) in enumerate(zip(prompts, answers, strict=True))
        ]

    def _run(self, answers: Sequence[Answer], finished: Callable[[], None]) -> None:
        if not answers:
            return
        reason = obstacle(self.model, [answer.params for answer in answers])
        if self._continuous is True and reason:
            raise ArgumentError(
                f"continuous_batching=True cannot be obeyed: {reason}. Leave it out, or change the "
                "sampling parameters."
            )
        wanted = self.model.device.type != "cpu" if self._continuous == "auto" else self._continuous
        if wanted and reason is None:
            answer_continuously(self.model, answers, self._engine, finished)
        else:
            pad = self.tokenizer.pad_token_id or 0
            answer_padded(self.model, answers, self._engine, pad, finished)

    def _new_answer(self, ids: Sequence[int], params: SamplingParams, number: int) -> Answer:
        longest = self._engine.positions(self.model)
        room = longest - len(ids)
        if not ids or room < 1:
            whose = "max_model_len" if longest == self._engine.max_model_len else "the model"
            raise ArgumentError(
                f"A prompt has {len(ids)} tokens, wanted at least 1 and fewer than the {longest} "
                f"positions of {whose}."
            )
        drawn = params.seed is None and not params.greedy
        seed = int(torch.randint(2**62, ())) if drawn else (params.seed or 0) + number
        return Answer(
            ids,
            params,
            seed=seed,
            ends=frozenset() if params.ignore_eos else self._ends(),
            limit=min(params.max_tokens or room, room),
            decode=partial(self.tokenizer.decode, skip_special_tokens=params.skip_special_tokens),
        )

    def _ends(self) -> frozenset[int]:
        """The model's own end tokens, and the tokenizer's."""
        own = self.model.generation_config.eos_token_id
        listed = own if isinstance(own, (list, tuple)) else [own]
        ends = {*listed, self.tokenizer.eos_token_id} - {None}
        return frozenset(int(token) for token in ends if token is not None)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts; one prompt alone becomes a list of it."""
    single = isinstance(prompts, (str, Mapping)) or (
        len(prompts) > 0 and all(isinstance(entry, int) for entry in prompts)
    )
    return [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]


def _output(index: int, answer: Answer) -> CompletionOutput:
    reason = answer.reason or "length"
    return CompletionOutput(index, answer.text(), answer.tokens, reason, answer.stopped_by)


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[], None]]:
    """A bar that moves on by one whenever the function that it gives is called."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="Answers", unit="answer", disable=not show) as bar:

        def finished() -> None:
            bar.update()

        yield finished
