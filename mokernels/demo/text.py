"""The texts that the demo calibrates with and measures perplexity on: every Python has them.

``pydoc_data.topics`` holds the reference pages that ``help("calls")`` shows. The pages chosen here
are English prose and read the same, to the byte, in Python 3.11, 3.12 and 3.13.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from mokernels.errors import MissingDependencyError

TOPICS = ("calls", "comparisons", "exceptions", "for", "import", "with")
CALIBRATION_TOPICS = ("execmodel", "strings", "assignment", "try", "types", "compound")
"""Other pages: what a model was calibrated with is no test of it."""
SHA256 = "8c10b244e716e271e86a71e1e0739a82bec34bfcf440df7cbdb52f5f806cb9c6"
"""Of the text on Python 3.11, 3.12 and 3.13."""


@dataclass(frozen=True)
class ReferenceText:
    """A text and whether it is the one that the published numbers were measured on.

    Attributes:
        text: the pages, with an empty line between them.
        pinned: whether it is that text to the byte; a later Python may have reworded a page.
    """

    text: str
    pinned: bool


def reference_text() -> ReferenceText:
    """The pages of this interpreter.

    Raises:
        MissingDependencyError: the interpreter comes without its documentation.
    """
    text = "\n\n".join(_pages(TOPICS))
    return ReferenceText(text, hashlib.sha256(text.encode()).hexdigest() == SHA256)


def calibration_texts() -> list[str]:
    """The pages to calibrate with.

    Raises:
        MissingDependencyError: the interpreter comes without its documentation.
    """
    return _pages(CALIBRATION_TOPICS)


def _pages(names: tuple[str, ...]) -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MissingDependencyError(
            "This Python comes without the module pydoc_data.topics, whose text the demo measures "
            "perplexity on. Install the whole standard library (on Debian: libpython3-stdlib)."
        ) from error
    return [topics[name] for name in names if name in topics]
