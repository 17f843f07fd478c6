"""What the compile pass does, as one value that is part of Inductor's cache key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mokernels.errors import ArgumentError

PREFIX = "mokernels."


@dataclass(frozen=True)
class FusionOptions:
    """Which rewrites the pass may do; each is on by default.

    Attributes:
        share_quantization: quantize an activation once for all projections that take it.
        merge_projections: launch projections of one input as one GEMM, where their weights lie side
            by side.
        fuse_norm: residual addition, RMSNorm and quantization in one kernel of ours.
        fuse_activation: SiLU or GELU, multiplication and quantization in one kernel of ours.
        expand: leave quantizations that follow code of Inductor's to Inductor.
        quantize_in_gemm: quantize inside the GEMM's own operator where nothing else can be fused.
    """

    share_quantization: bool = True
    merge_projections: bool = True
    fuse_norm: bool = True
    fuse_activation: bool = True
    expand: bool = True
    quantize_in_gemm: bool = True


def split_options(options: Mapping[str, Any] | None) -> tuple[FusionOptions, dict[str, Any]]:
    """Our options and Inductor's, from what a user passes as ``torch.compile(options=...)``.

    Args:
        options: keys that begin with ``mokernels.`` are the attributes of :class:`FusionOptions`,
            the rest are Inductor's.

    Raises:
        ArgumentError: one of ours is unknown, or not a bool.
    """
    given = dict(options or {})
    ours = {key: given.pop(key) for key in list(given) if key.startswith(PREFIX)}
    known = [field.name for field in fields(FusionOptions)]
    for key, chosen in ours.items():
        if key.removeprefix(PREFIX) not in known:
            raise ArgumentError(
                f"torch.compile was given the option {key!r}, wanted one of "
                f"{', '.join(PREFIX + name for name in known)}, or an option of Inductor's."
            )
        if not isinstance(chosen, bool):
            raise ArgumentError(
                f"torch.compile was given {key} = {chosen!r}, wanted True or False."
            )
    return FusionOptions(**{key.removeprefix(PREFIX): v for key, v in ours.items()}), given
