"""What all commands share: consoles, and errors without a traceback."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from mokernels.errors import ArgumentError, MokernelsError

FAILED = 1
"""Exit code of a failed check, and of every error that is not wrong use."""
WRONG_USE = 2
"""Exit code of an option or argument that cannot be."""
_PIPE_WIDTH = 160
"""Columns of a table when nothing says how wide the output is."""

Debug = Annotated[
    bool, typer.Option("--debug", help="Show the whole traceback when something fails.")
]

P = ParamSpec("P")


def stdout() -> Console:
    """Where results go; wide when piped, so that tables keep their rows."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_PIPE_WIDTH if piped else None)


def stderr() -> Console:
    """Where errors, warnings and progress go."""
    return Console(stderr=True)


def complain(message: str, style: str = "red") -> None:
    """Print a message to stderr as it is: no markup, no line breaks of ours."""
    stderr().print(Text(message, style=style), soft_wrap=True)


def sentences(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the exceptions of a command into one red message and an exit code.

    The command has to take ``debug: bool`` and ``context: typer.Context``, whose ``obj`` is the
    ``--debug`` that was given before the command's name.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # `mokernels ... | head`: typer ends quietly
            raise typer.Exit(_report(error, kwargs)) from error

    return run


def _report(error: Exception, options: dict[str, Any]) -> int:
    if options["debug"] or options["context"].obj:
        traceback.print_exception(error)
    elif isinstance(error, (MokernelsError, OSError)):
        complain(str(error))
    else:
        complain(f"{type(error).__name__}: {error}\nRun it again with --debug to see where.")
    return WRONG_USE if isinstance(error, ArgumentError) else FAILED


def pick_device(name: str) -> str:
    """``"auto"`` becomes ``"cuda"`` or ``"xpu"`` where there is such a device, else ``"cpu"``."""
    import torch

    if name != "auto":
        _check_device(name)
        return name
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    known = accelerator is not None and accelerator.type in ("cuda", "xpu")
    return accelerator.type if known else "cpu"  # type: ignore[union-attr]


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch asserts when it was built without the backend, and raises RuntimeError otherwise.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ArgumentError(
            f"The device {name!r} cannot be used: {reason}. Try 'cpu', 'cuda' or 'auto'."
        ) from error
