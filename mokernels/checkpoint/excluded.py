"""Which modules a checkpoint says it leaves unquantized, as briefly as ModelOpt says it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def summarize_excluded(plain: Iterable[str], quantized: Sequence[str]) -> list[str]:
    """Patterns that match every plain module and no quantized one, as ModelOpt writes them.

    A subtree of which nothing is quantized becomes one pattern, for the shortest prefix at a dot:
    ``prefix*``, or ``prefix.*`` where a quantized name begins with ``prefix`` itself.

    Args:
        plain: names of the modules that could have been quantized and are not, in the model's
            order.
        quantized: names of the quantized modules.

    Returns:
        The patterns in alphabetical order.
    """
    names = frozenset(quantized)
    begun = {name[:end] for name in quantized for end in range(len(name) + 1)}
    patterns = {_pattern(name, names, begun) for name in plain}
    return sorted(patterns)


def _pattern(name: str, quantized: frozenset[str], begun: set[str]) -> str:
    """The shortest pattern for ``name``; ``begun`` is every prefix of a quantized name."""
    for end, character in enumerate(name):
        if character != ".":
            continue
        prefix = name[:end]
        if prefix not in begun:
            return f"{prefix}*"
        if f"{prefix}." not in begun and prefix not in quantized:
            return f"{prefix}.*"
    return name
