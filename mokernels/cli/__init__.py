"""The command ``mokernels``: each command parses its options, calls one function and prints.

Whatever takes seconds to import (transformers, the hub's client) is imported inside the commands.
"""

from mokernels.cli import app as _app  # noqa: F401  (registers commands, in the order of the help)
from mokernels.cli import making as _making  # noqa: F401
from mokernels.cli import serving as _serving  # noqa: F401
from mokernels.cli.root import app, main

__all__ = ["app", "main"]
