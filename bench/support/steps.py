"""Whether a compiled model's step is right.

Two right computations of a deep quantized model drift apart: one rounding of bf16 puts some
activations on the other side of a tie, the next quantization makes whole codes of that, and after
some layers the two are as far apart as quantizing put them from the original. Compiled and eager,
or one rounding of the embeddings apart, 32 layers of width 1024 give logits that differ by 0.07 in
FP8 and 0.21 in NVFP4, on a CPU; from bf16 they differ by 0.07 and 0.22. No bound of the logits
alone tells that drift from a fault. So every layer is also checked by itself, over the very hidden
states that enter it in the eager model: there nothing adds up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.support.checks import relative_error
from bench.support.contest import Check
from bench.support.llama import Decoder, Prefill

ROUNDINGS = 3.0
"""A result may be as far off as this many roundings of its input move it. Inductor rounds a layer's
bf16 values in fewer places than eager mode does, and the kernels add in another order."""

LEAST_OF_LAYER, LEAST_OF_LOGITS = 0.01, 0.06


@dataclass(frozen=True)
class EagerStep:
    """One step, layer by layer.

    Attributes:
        logits: of the step, [batch, vocab].
        logits_moved: how far they move, relatively, if each embedding moves by one rounding.
        states: what enters each layer.
        updates: what each layer adds to that, fp32.
        updates_moved: how far each update moves if what enters its layer moves by one rounding.
    """

    logits: Tensor
    logits_moved: float
    states: list[Tensor]
    updates: list[Tensor]
    updates_moved: list[float]

    @classmethod
    def of(cls, model: Decoder | Prefill) -> EagerStep:
        """Runs the model without compiling it, and leaves it at the beginning."""
        with torch.compiler.set_stance("force_eager"):
            states = model.states()
            updates = model.updates(states)
            moved = model.updates([nudged(state) for state in states])
            model.begin()
            logits = model().clone()
            model.begin()
            logits_moved = relative_error(model(nudged), logits)
            model.begin()
        return cls(logits, logits_moved, states, updates, list(map(relative_error, moved, updates)))

    @property
    def logits_bound(self) -> float:
        return max(LEAST_OF_LOGITS, ROUNDINGS * self.logits_moved)

    def check(self, model: Decoder | Prefill) -> Check:
        """Of the logits of ``model``'s first step, and of each of its layers as it is compiled.

        It leaves the model at the beginning.
        """

        def check(logits: Tensor) -> float:
            shares = [relative_error(logits, self.logits) / self.logits_bound, *self.layers(model)]
            return max(shares, key=lambda share: share if share == share else float("inf"))

        return check

    def layers(self, model: Decoder | Prefill) -> list[float]:
        """The error of each layer's update, as a share of what is allowed."""
        model.begin()
        found = map(relative_error, model.updates(self.states), self.updates)
        allowed = (max(LEAST_OF_LAYER, ROUNDINGS * moved) for moved in self.updates_moved)
        shares = [error / bound for error, bound in zip(found, allowed, strict=True)]
        model.begin()
        return shares


def nudged(values: Tensor) -> Tensor:
    """Every value moved to one of its bf16 neighbours, up or down at random but always alike."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, values.shape, generator=generator).to(values.device) * 2 - 1
    return (values * (1 + signs * 2.0**-8)).to(values.dtype)
