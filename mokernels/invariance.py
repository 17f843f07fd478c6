"""Batch invariance: a row of a batch gets the bits that it gets alone.

The one place where the mode is kept. Operators ask for it each time they run, in the thread that
calls them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar

_DEPTH: ContextVar[int] = ContextVar("mokernels_batch_invariant", default=0)


class _BatchInvariant(AbstractContextManager[None]):
    """Counts how deep it is entered, so that one object may be entered again inside itself."""

    def __enter__(self) -> None:
        _DEPTH.set(_DEPTH.get() + 1)

    def __exit__(self, *_: object) -> None:
        _DEPTH.set(_DEPTH.get() - 1)


def batch_invariant() -> AbstractContextManager[None]:
    """While active, a row of x gets the same bits from a product whatever other rows are there.

    ::

        with mokernels.batch_invariant():
            y = model(tokens)

    What it promises: for every linear and GEMM operator of mokernels, in every format and for every
    number M of rows, row i of the result for x [M, K] equals the result for x[i : i + 1] bit for
    bit, on one device, with one version of torch and triton. So do the codes and scales of every
    quantizer, which need no mode for that, as do the kernels that fuse a norm or a gated activation
    with one: these sum in an order that K alone decides.

    What it does not: attention, products of weights that are not quantized, sampling, and norms and
    activation functions that torch itself or Inductor computes. Nor do two devices, or two values
    of N, share bits because of it. Gradients are not covered.

    How: without it a product of few rows is summed in several parts of K at once (split-K), whose
    number follows M; with it their number is the one that a single row takes. With more than 64
    rows one program adds these parts one after the other, in the same order.

    What it costs on a GPU has not been measured. On the CPU, where torch's product is not
    invariant, each row is multiplied by itself, so that many rows are slow: for comparisons.

    Whose calls: those of this thread (of this ``contextvars`` context: an asyncio task inherits it,
    a new thread begins without). What is recorded keeps what was active then: a CUDA graph replays
    the kernels of its capture, and :func:`mokernels.generate` captures its steps once with and once
    without. ``torch.compile`` has to compile inside, or the CPU's products are not invariant: a
    graph that was compiled outside, without the mode, multiplies by torch's own product there. On
    a GPU compiled graphs call the operators, which ask when they run.

    It may be entered again inside itself. Enter it outside of functions that are compiled.
    """
    return _BatchInvariant()


def is_batch_invariant() -> bool:
    """Whether :func:`batch_invariant` is active for the caller."""
    return _DEPTH.get() > 0
