"""What the environment says: the only place that reads mokernels' own variables."""

from __future__ import annotations

import os
from pathlib import Path

from mokernels.errors import ArgumentError

CACHE_VARIABLE = "MOKERNELS_CACHE"
"""Environment variable that names the folder for downloads and for measured configurations."""

LAUNCHES_VARIABLE = "MOKERNELS_REMEMBER_LAUNCHES"
"""Environment variable: with 0 every call is checked, planned and launched through Triton anew.

Results are the same. It tells a fault of remembered launches from others.
"""


def remembers_launches() -> bool:
    """Whether calls are replayed; ``$MOKERNELS_REMEMBER_LAUNCHES`` says 0 if they are not to be.

    Raises:
        ArgumentError: it says neither 0 nor 1.
    """
    given = os.environ.get(LAUNCHES_VARIABLE, "") or "1"
    if given not in ("0", "1"):
        raise ArgumentError(
            f"The environment variable {LAUNCHES_VARIABLE} is {given!r}, wanted 1 to remember how "
            "a call was launched, or 0 to plan every call anew. Unset, it is 1."
        )
    return given == "1"


def cache_folder() -> Path:
    """``$MOKERNELS_CACHE``, else ``$XDG_CACHE_HOME/mokernels``, else ``~/.cache/mokernels``."""
    given = os.environ.get(CACHE_VARIABLE, "")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "mokernels"
