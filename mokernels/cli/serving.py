"""The commands that hand over to transformers and to other programs."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from mokernels.cli.root import Checkpoint, app
from mokernels.cli.support import Debug, sentences

_HANDED_OVER: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}
}
"""Settings of a command that passes on the options that it does not know."""


@app.command(
    epilog="Example: mokernels serve ./Llama-3.1-8B-Instruct-FP8 --continuous-batching",
    **_HANDED_OVER,
)
@sentences
def serve(context: typer.Context, path: Checkpoint, debug: Debug = False) -> None:
    """Serve a checkpoint with transformers' server, which speaks OpenAI's protocol.

    PATH comes first; behind it goes any flag of `transformers serve`, whose help lists them:
    --host, --port, --continuous-batching, --device, --dtype, ... There is no authentication.
    """
    from mokernels.cli import serve as service

    service.serve(path, context.args)


@app.command(
    epilog="Example: mokernels chat ./Llama-3.1-8B-Instruct-FP8 max_new_tokens=100",
    **_HANDED_OVER,
)
@sentences
def chat(
    context: typer.Context,
    path: Checkpoint,
    url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of a running server; without it the checkpoint is served meanwhile."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Chat with a checkpoint in the terminal, by transformers' own client.

    PATH comes first; behind it go generation flags (max_new_tokens=100) and any flag of
    `transformers chat`, whose help lists them.
    """
    from mokernels.cli import serve as service

    service.chat(path, url, context.args)


@app.command(
    epilog="Example: mokernels run -m lm_eval --model hf --model_args pretrained=./model-FP8",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": ["--help"],
    },
)
@sentences
def run(context: typer.Context, debug: Debug = False) -> None:
    """Run a Python script, or a module with -m, with mokernels imported.

    Whatever it loads through transformers may be a ModelOpt checkpoint.
    """
    from mokernels.cli.run import run as run_python

    run_python(context.args)
