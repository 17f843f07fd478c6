"""Options of ``generate``, from wherever transformers takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def setting(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """The value of an option: as given, else by ``generation_config=``, else the model's own.

    Args:
        model: with a ``generation_config``.
        arguments: of its ``generate``.
        name: of the option.

    Returns:
        The value, None where nobody says one.
    """
    if name in arguments:
        return arguments[name]
    configs = (arguments.get("generation_config"), getattr(model, "generation_config", None))
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)
