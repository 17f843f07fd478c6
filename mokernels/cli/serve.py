"""``mokernels serve`` and ``mokernels chat``: transformers' own server and client, handed over to.

Both run in this process, where mokernels is imported: the server loads ModelOpt checkpoints. Before
that the things are looked at that would fail late or without a reason.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mokernels.checkpoint import open_checkpoint
from mokernels.demo.hub import HubError, is_hub_id
from mokernels.errors import ArgumentError, MissingDependencyError
from mokernels.hf.auto import require_tokenizer

PACKAGES = ("fastapi", "openai", "pydantic", "uvicorn")
LOOPBACK = "127.0.0.1"
PROGRAM = "mokernels"
_PORTS = 2**16


def serve(model: str, flags: Sequence[str]) -> None:
    """Serve one model until interrupted: ``transformers serve MODEL FLAGS``.

    Args:
        model: a folder, or a model of the Hugging Face hub.
        flags: any of ``transformers serve``.

    Raises:
        MissingDependencyError: a package of the server is missing.
        ArgumentError: the folder has no tokenizer, or the port is taken.
        CheckpointError: the checkpoint is broken.
        HubError: there is no such folder.
        SystemExit: with code 2 and a message, a flag is unknown.
    """
    require_packages("serve")
    check_model(model)
    host, port = address(flags)
    require_free(host, port)
    command_line(["serve", model, *flags])


def chat(model: str, url: str | None, flags: Sequence[str]) -> None:
    """Talk to a model: ``transformers chat MODEL URL FLAGS``.

    Args:
        model: as the server calls it; without ``url`` as in :func:`serve`.
        url: of a running server; without one the model is served on a free port of this machine's
            loopback interface for as long as the chat lasts.
        flags: any of ``transformers chat``.

    Raises:
        The same as :func:`serve`.
    """
    require_packages("chat")
    if url is not None:
        command_line(["chat", model, url, *flags])
        return
    check_model(model)
    with server(model) as own:
        command_line(["chat", model, own, *flags])


@contextmanager
def server(model: str, **options: Any) -> Iterator[str]:
    """A server of one model in a thread; gives its URL.

    Args:
        model: a folder, or a model of the Hugging Face hub.
        **options: of ``transformers.cli.serve.Serve``.
    """
    import_mokernels()
    port = free_port()
    from transformers.cli.serve import Serve

    running = Serve(
        force_model=model, host=LOOPBACK, port=port, non_blocking=True, log_level="error", **options
    )
    for name in ("uvicorn.error", "uvicorn.access"):  # it logs to the terminal that is talked in
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield f"http://{LOOPBACK}:{port}/v1"
    finally:
        running.kill_server()


def command_line(words: Sequence[str]) -> None:
    """Run ``transformers WORDS`` in this process; its usage errors exit with code 2."""
    import_mokernels()
    from huggingface_hub.constants import HF_HUB_CACHE

    # Older versions of transformers fail to list the models of a cache that was never made.
    os.makedirs(HF_HUB_CACHE, exist_ok=True)
    # Not its main(): that asks the package index for a newer version first.
    from transformers.cli.transformers import app

    with generation_ends():
        app(args=list(words), prog_name=PROGRAM)


@contextmanager
def generation_ends() -> Iterator[None]:
    """Stop continuous batching in the end; transformers' server leaves its thread running.

    The thread would keep the process alive after the server has been interrupted.
    """
    from transformers.cli.serving.utils import GenerationState

    made: list[GenerationState] = []
    begin = GenerationState.__init__

    def remember(self: GenerationState, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        made.append(self)

    GenerationState.__init__ = remember
    try:
        yield
    finally:
        GenerationState.__init__ = begin
        for state in made:
            state.shutdown()


def import_mokernels() -> None:
    """Import mokernels as a whole, which registers with transformers when that is imported."""
    import mokernels  # noqa: F401


def require_packages(command: str) -> None:
    """Raise MissingDependencyError unless the packages of transformers' server are there."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"`mokernels {command}` needs the packages {', '.join(missing)}, which are not "
            'installed. Install them with `pip install "mokernels[serve]"`.'
        )


def check_model(model: str) -> None:
    """Raise if ``model`` cannot be served: no such folder, a broken one, or one without tokenizer.

    A name on the hub is left to transformers, which fetches it.
    """
    folder = Path(model)
    if os.path.lexists(folder):
        open_checkpoint(folder).close()
        require_tokenizer(folder, instead="")
    elif not is_hub_id(model):
        raise HubError(
            f"The path {model!r} does not exist, and it is no name of a model on the Hugging Face "
            "hub (owner/name) either. Check the path."
        )


def address(flags: Sequence[str]) -> tuple[str, int]:
    """Host and port that ``transformers serve`` takes from its flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", default="8000")
    try:
        found, _ = parser.parse_known_args(list(flags))
        port = int(found.port)
    except (argparse.ArgumentError, ValueError) as error:
        raise ArgumentError(f"--port or --host cannot be read: {error}.") from error
    if not 0 < port < _PORTS:
        raise ArgumentError(f"--port is {port}, wanted a number from 1 to {_PORTS - 1}.")
    return found.host, port


def require_free(host: str, port: int) -> None:
    """Raise ArgumentError if nothing can listen there: known now, not after the model is loaded."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.create_server(found[0][4][:2], family=found[0][0]):
            pass
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "another program listens there" if taken else str(error)
        raise ArgumentError(
            f"The server cannot listen on port {port} of {host!r}: {reason}. Choose another --port "
            "or --host."
        ) from error


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.create_server((LOOPBACK, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
