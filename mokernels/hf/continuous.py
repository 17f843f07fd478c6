"""Answers by transformers' continuous batching, for requests that it treats exactly.

It samples all rows of a batch by one random generator and with one temperature, top_k and top_p,
and knows neither min_p nor penalties nor stop texts. So requests of equal sampling parameters form
a group of their own; stop texts are looked for here, and their requests cancelled when they come.
What has a seed, min_p, a penalty or min_tokens is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from mokernels.errors import BackendError
from mokernels.hf.answers import Answer
from mokernels.hf.engine import Engine
from mokernels.hf.experts import has_experts
from mokernels.hf.sampling import SamplingParams

PAGE = 256
"""Tokens of a block of the paged cache: transformers' default."""
_WAIT_SECONDS = 1.0
_HAS_SWITCH = "auto_switch_to_flash" in ContinuousBatchingConfig.__dataclass_fields__
_KINDS = frozenset({"full_attention", "sliding_attention"})


def obstacle(model: Any, params: Sequence[SamplingParams]) -> str | None:
    """Why continuous batching would not be exact or not run, as a clause; None if it is fine."""
    if not hasattr(model, "init_continuous_batching"):
        return f"{type(model).__name__} has no continuous batching"
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if kinds or model.config.is_encoder_decoder:
        return f"{type(model).__name__} is no decoder with attention alone"
    for row in params:
        if row.seed is not None:
            return "it has no random numbers of one request, and a seed is given"
        if row.min_p or row.penalized or row.min_tokens:
            return "it knows neither min_p nor penalties nor min_tokens"
    return None


def answer_continuously(
    model: Any, answers: Sequence[Answer], engine: Engine, finished: Callable[[], None]
) -> None:
    """Make the answers, each row leaving the batch when it ends and another taking its place.

    Args:
        model: a decoder that :func:`obstacle` has nothing against.
        answers: to fill.
        engine: how.
        finished: called for each answer that has ended.

    Raises:
        BackendError: transformers failed; the message has its reason.
    """
    groups: dict[tuple[Any, ...], list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.params.filters, []).append(answer)
    for group in groups.values():
        with own_attention(model):
            _answer_group(model, group, engine, finished)


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Let the model keep its own kind of attention; transformers would take another.

    Where the package ``kernels`` is installed, it downloads flash attention for this. Newer
    versions have an option against that; for older ones the attention has to be a paged one
    already.
    """
    own = model.config._attn_implementation
    if not _HAS_SWITCH and not own.startswith("paged|"):
        model.set_attn_implementation(f"paged|{own}")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _answer_group(
    model: Any, group: Sequence[Answer], engine: Engine, finished: Callable[[], None]
) -> None:
    manager = model.init_continuous_batching(
        generation_config=_generation_config(group[0].params),
        continuous_batching_config=_batching_config(model, group, engine),
    )
    waiting = {str(index): answer for index, answer in enumerate(group)}
    try:
        for name, answer in waiting.items():
            manager.add_request(
                list(answer.prompt),
                request_id=name,
                max_new_tokens=answer.limit,
                streaming=bool(answer.params.stops),
                eos_token_id=sorted(answer.end_tokens),
            )
        manager.start()
        while waiting:
            _take(manager, waiting, finished)
    finally:
        manager.stop(block=True, hard_stop=True)
        manager.destroy()


def _take(manager: Any, waiting: dict[str, Answer], finished: Callable[[], None]) -> None:
    """Wait for the next output of any request."""
    output = manager.get_result(timeout=_WAIT_SECONDS)
    if output is None:
        if not manager.is_running():
            raise _failure(manager.background_thread_status.fatal_error)
        return
    answer = waiting.get(output.request_id)
    if answer is None:  # made before its cancellation was seen
        return
    if output.error is not None:
        raise _failure(output.error)
    for token in output.generated_tokens[len(answer.tokens) :]:
        if answer.add(token):
            break
    if answer.reason is None:
        if output.is_finished():
            raise _failure(f"a request ended after {len(answer.tokens)} tokens for no reason")
        return
    del waiting[output.request_id]
    finished()
    if not output.is_finished():
        manager.cancel_request(output.request_id)


def _failure(reason: object) -> BackendError:
    return BackendError(
        f"transformers' continuous batching failed: {reason}. Pass continuous_batching=False to go "
        "without it."
    )


def _generation_config(params: SamplingParams) -> GenerationConfig:
    if params.greedy:
        return GenerationConfig(do_sample=False, eos_token_id=-1)
    temperature, top_k, top_p = params.filters
    return GenerationConfig(
        do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, eos_token_id=-1
    )


def _batching_config(
    model: Any, group: Sequence[Answer], engine: Engine
) -> ContinuousBatchingConfig:
    batch = engine.max_num_seqs
    options: dict[str, Any] = {"max_requests_per_batch": batch}
    if engine.gpu_memory_utilization is not None:
        options["max_memory_percent"] = engine.gpu_memory_utilization
    if engine.enforce_eager or has_experts(model):  # what experts run, the host decides
        options["use_cuda_graph"] = False
    if _HAS_SWITCH:
        options["auto_switch_to_flash"] = False
    if model.device.type == "cpu":
        # Left alone it takes more than half of the machine's memory.
        pages = sorted(-(-(len(row.prompt) + row.limit) // PAGE) for row in group)
        options |= {"num_blocks": sum(pages[-batch:]) + 1, "max_batch_tokens": 2 * PAGE}
    seed = int(torch.randint(2**31, ()))  # without one it seeds torch's generator by the clock
    return ContinuousBatchingConfig(seed=seed, **options)
