from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import make_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid FP8 checkpoint to damage."""
    return make_checkpoint(tmp_path / "checkpoint")
