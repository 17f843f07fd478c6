"""Where mokernels keeps files of its own: the only place that reads its environment variable."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "MOKERNELS_CACHE"
"""Environment variable that names the folder for downloads and for measured configurations."""


def cache_folder() -> Path:
    """``$MOKERNELS_CACHE``, else ``$XDG_CACHE_HOME/mokernels``, else ``~/.cache/mokernels``."""
    given = os.environ.get(CACHE_VARIABLE, "")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "mokernels"
