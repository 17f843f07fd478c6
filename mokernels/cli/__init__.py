"""The command ``mokernels``: each command parses its options, calls one function and prints.

Whatever takes seconds to import (transformers, the hub's client) is imported inside the commands.
"""

from mokernels.cli.app import app, main

__all__ = ["app", "main"]
