"""``mokernels run``: a script or module as Python would run it, with mokernels imported."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType

from mokernels.errors import ArgumentError

_INTERRUPTED = 130
_OURS = frozenset({__file__, runpy.__file__, "<frozen runpy>"})


def run(arguments: Sequence[str]) -> None:
    """Run ``script.py args...`` or ``-m module args...``; its exit code is the command's.

    Whatever it imports of transformers loads ModelOpt checkpoints. ``sys.argv`` and ``sys.path[0]``
    are as Python sets them.

    Args:
        arguments: the words after ``mokernels run``.

    Raises:
        ArgumentError: neither a script nor a module is named, or the script does not exist.
        SystemExit: of the script; with code 1 after an exception, whose traceback is printed.
    """
    import mokernels  # noqa: F401  (registers with transformers when that is imported)

    module, words = _split(arguments)
    try:
        if module:
            sys.argv = ["-m", *words[1:]]
            sys.path[0] = os.getcwd()
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        print_traceback(error)
        interrupted = isinstance(error, KeyboardInterrupt)
        raise SystemExit(_INTERRUPTED if interrupted else 1) from None


def _split(arguments: Sequence[str]) -> tuple[bool, Sequence[str]]:
    """Whether a module is to run, and its name or the script's with their arguments."""
    module = bool(arguments) and arguments[0] == "-m"
    words = arguments[1:] if module else arguments
    if not words:
        raise ArgumentError(
            "There is nothing to run. Give a script and its arguments, or -m and a module: "
            "mokernels run -m lm_eval --model hf ..."
        )
    if not module and not os.path.exists(words[0]):
        raise ArgumentError(
            f"The script {words[0]!r} does not exist. For a module write "
            f"`mokernels run -m {words[0]}`."
        )
    return module, words


def print_traceback(error: BaseException) -> None:
    """Print a traceback to stderr, without the frames that led to the script."""
    place: TracebackType | None = error.__traceback__
    while place is not None and place.tb_frame.f_code.co_filename in _OURS:
        place = place.tb_next
    traceback.print_exception(type(error), error, place or error.__traceback__)
