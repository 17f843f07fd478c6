"""Cases: a decoder layer under torch.compile, and decoding with a whole model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.support import llama
from bench.support.checks import close_check, relative_error
from bench.support.contest import Case, Contender, Contest, Peer, Setting, UnavailableError, Work
from bench.support.steps import EagerStep
from bench.support.timing import Call
from mokernels.layers import QuantizedLinear

FORMAT_BYTES = {
    "FP8": 1.0,
    "FP8_PER_CHANNEL_PER_TOKEN": 1.0,
    "FP8_PB_WO": 1.0,
    "NVFP4": 0.5 + 1 / 16,
    "MXFP8": 1.0 + 1 / 32,
}
"""Of one weight with the scales of its blocks."""

PEER_BOUND = 0.5
"""Of logits and of a layer's update, without the format's quantization or with another. Four bits
move logits of 32 layers by 0.22, FP8 by 0.07; unrelated ones are 1.4 apart."""


def layer_cases() -> Iterator[Case]:
    for format in ("FP8_PER_CHANNEL_PER_TOKEN", "FP8", "NVFP4", "MXFP8", "FP8_PB_WO"):
        for m in (1, 16, 128, 2048):
            yield Case(
                name=f"decoder layer {format} M={m}",
                group="compiled decoder layer (Llama-3.1-8B)",
                tier=2 if format in ("FP8_PER_CHANNEL_PER_TOKEN", "FP8", "NVFP4") else 6,
                build=partial(_layer_contest, format, m),
                facts={"format": format, "m": m},
            )


def decode_cases() -> Iterator[Case]:
    targets = {"FP8": 1.75, "NVFP4": 2.4}
    for batch in (1, 16):
        for format, target in targets.items():
            yield Case(
                name=f"decode {format} batch {batch}",
                group="decoding, 8B-shaped random weights, static cache, CUDA graph",
                tier=1,
                build=partial(_decode_contest, format, batch),
                facts={"format": format, "batch": batch, "tokens_per_call": batch},
                target=target if batch == 1 else None,
                against=("compiled bf16",),
            )


def cpu_cases() -> Iterator[Case]:
    """Eager and compiled on the CPU: a small model, and one of the demo's size."""
    models = {"small": llama.SMALL, "SmolLM2-135M-shaped": llama.SMOLLM2_135M}
    for model, sizes in models.items():
        for format in FORMAT_BYTES:
            for tokens in (1, 128):
                what = "decode 1" if tokens == 1 else f"prefill {tokens}"
                yield Case(
                    name=f"{model} {format} {what}",
                    group="CPU: torch.compile(model) and eager",
                    tier=5 if model == "small" else 4,
                    build=partial(_cpu_contest, sizes, format, tokens),
                    facts={"model": model, "format": format, "tokens_per_call": tokens},
                    target=1.0,
                    against=("eager mokernels",),
                    device="cpu",
                    target_on="cpu",
                )


def _cpu_contest(sizes: llama.Sizes, format: str, tokens: int, setting: Setting) -> Contest:
    sizes = llama.TINY if setting.small else sizes
    model = _cpu_model(setting, sizes, format, tokens)
    plain = _cpu_model(setting, sizes, None, tokens)
    compiled = setting.compiled(model)

    def contender(name: str, run: nn.Module, state: Any) -> Contender:
        state.begin()
        stored = None if state is plain else format
        return Contender(name, [_step_of(run)], decode_work(sizes, stored, tokens))

    others = {"eager mokernels": (model, model), "eager bf16": (plain, plain)}
    if sizes is not llama.SMOLLM2_135M:  # compiling its 30 layers takes a minute each time
        others["compiled bf16"] = (setting.compiled(plain), plain)
    eager = EagerStep.of(model)
    return Contest(
        contender("compiled mokernels", compiled, model),
        [Peer(name, partial(contender, name, *both)) for name, both in others.items()],
        eager.check(model),
        close_check(eager.logits, PEER_BOUND),
    )


def _cpu_model(setting: Setting, sizes: llama.Sizes, format: str | None, tokens: int) -> Any:
    length = 16 if setting.small else 128
    if tokens == 1:
        return llama.Decoder(sizes, _converter(format), setting.device, 1, length)
    return llama.Prefill(sizes, _converter(format), setting.device, 8 if setting.small else tokens)


def _layer_contest(format: str, m: int, setting: Setting) -> Contest:
    sizes = llama.TINY if setting.small else llama.LLAMA_8B
    ours = _layer_entry(setting, sizes, "compiled mokernels", format, m)
    expected, allowed = _layer_on_cpu(setting, sizes, format, m)
    return Contest(
        ours,
        [
            Peer("compiled bf16", partial(_layer_entry, setting, sizes, "compiled bf16", None, m)),
            Peer(
                "compiled _scaled_mm",
                partial(_layer_entry, setting, sizes, "compiled _scaled_mm", "scaled_mm", m),
            ),
        ],
        close_check(expected, allowed),
        close_check(expected, PEER_BOUND),
    )


def _converter(format: str | None) -> llama.Convert:
    if format is None:
        return llama.keep
    return llama.ScaledMMLinear if format == "scaled_mm" else llama.quantized(format)


def _layer_entry(
    setting: Setting, sizes: llama.Sizes, name: str, format: str | None, m: int
) -> Contender:
    work = layer_work(sizes, format, m)
    config, convert = sizes.config(), _converter(format)
    calls: list[Call] = []
    for _ in range(setting.copies(int(work.moved))):
        layer = llama.build_layer(config, convert, setting.device, seed=1)
        layer.compile(fullgraph=True, dynamic=False, backend=setting.backend)
        calls.append(partial(llama.run_layer, layer, *_layer_inputs(setting, sizes, m)))
    # The update alone: with the residual in it every layer would look right.
    hidden = _layer_inputs(setting, sizes, m)[0]
    return Contender(name, calls, work, lambda result: result.float() - hidden.float())


def layer_work(sizes: llama.Sizes, format: str | None, m: int) -> Work:
    """Of the linear layers and their weights; attention over so few tokens adds little."""
    size = 2.0 if format is None else FORMAT_BYTES.get(format, 1.0)
    weights = sizes.linear_weights
    unit = "fp8" if format in ("scaled_mm", "FP8", "FP8_PER_CHANNEL_PER_TOKEN") else "bf16"
    return Work(2.0 * m * weights, size * weights, unit)


def _layer_inputs(setting: Setting, sizes: llama.Sizes, m: int) -> tuple[Tensor, Any, None]:
    """m tokens of one sequence, and where they stand; attention is causal without a mask."""
    generator = torch.Generator().manual_seed(m)
    hidden = torch.randn(1, m, sizes.hidden, generator=generator).to(llama.BF16)
    hidden = hidden.to(setting.device)
    rotations = llama.rotary(sizes.config(), setting.device)
    places = torch.arange(m, device=setting.device)[None]
    return hidden, rotations(hidden, places), None


def _layer_on_cpu(
    setting: Setting, sizes: llama.Sizes, format: str, m: int
) -> tuple[Tensor, float]:
    """The update of the eager layer on the CPU, where our operators are their own definition.

    And how far a right one may be from it: three times as far as it moves when its input moves by
    one rounding. Values near a tie then get the code beside theirs, as they do when kernels add in
    another order; with 4 bits that is half of the value.
    """
    layer = llama.build_layer(sizes.config(), _converter(format), setting.device, seed=1)
    on_cpu = copy.deepcopy(layer).cpu()
    for module in on_cpu.modules():
        if isinstance(module, QuantizedLinear):
            module.refresh()
    hidden, rotations, mask = _layer_inputs(setting, sizes, m)
    hidden, rotations = hidden.cpu(), tuple(part.cpu() for part in rotations)

    def update(x: Tensor) -> Tensor:
        return llama.run_layer(on_cpu, x, rotations, mask).float() - x.float()

    expected = update(hidden)
    return expected, max(0.01, 3 * relative_error(update(hidden * (1 + 2**-8)), expected))


def _decode_contest(format: str, batch: int, setting: Setting) -> Contest:
    sizes, length = (llama.TINY, 16) if setting.small else (llama.LLAMA_8B, 512)
    model = _decoder(setting, sizes, format, batch, length)
    # Layers are checked against the CPU by the cases of layers; here that all of them, compiled and
    # captured, are what they are when run one by one.
    eager = EagerStep.of(model)
    others = {"compiled bf16": None, "compiled _scaled_mm": "scaled_mm"}

    def peer(name: str, other: str | None) -> Contender:
        theirs = _decoder(setting, sizes, other, batch, length)
        return Contender(name, [_step_of(theirs)], decode_work(sizes, other, batch))

    work = decode_work(sizes, format, batch)
    return Contest(
        Contender("compiled mokernels", [_step_of(model)], work),
        [Peer(name, partial(peer, name, other)) for name, other in others.items()],
        eager.check(model),
        close_check(eager.logits, PEER_BOUND),
    )


def _decoder(
    setting: Setting, sizes: llama.Sizes, format: str | None, batch: int, length: int
) -> llama.Decoder:
    """The model, from an earlier case if there was one, at the beginning of a sequence."""

    def make() -> llama.Decoder:
        size = 2 if format is None else FORMAT_BYTES.get(format, 1.0)
        needed = sizes.layers * sizes.linear_weights * size + 4 * sizes.vocab * sizes.hidden
        _check_memory(setting, needed)
        model = llama.Decoder(sizes, _converter(format), setting.device, batch, length)
        model.compile_layers(setting.backend)
        return model

    model: llama.Decoder = setting.keep(("decoder", sizes, format), make)
    model.start(batch, length)
    return model


def _step_of(model: nn.Module) -> Call:
    return lambda: model()


def decode_work(sizes: llama.Sizes, format: str | None, batch: int) -> Work:
    """Of the linear layers of all layers and the head, whose weight stays bf16."""
    layer, head = layer_work(sizes, format, batch), sizes.vocab * sizes.hidden
    return Work(
        sizes.layers * layer.flops + 2.0 * batch * head,
        sizes.layers * layer.moved + 2 * head,
        layer.unit,
    )


def _check_memory(setting: Setting, needed: float) -> None:
    if setting.device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(setting.device)
    if free < 1.2 * needed:
        raise UnavailableError(
            f"it needs about {needed / 1e9:.0f} GB and {free / 1e9:.0f} GB are free"
        )
