"""The command itself, and what its commands have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from mokernels.cli.support import Debug

app = typer.Typer(
    name="mokernels",
    help="NVIDIA ModelOpt checkpoints (FP8, NVFP4, MXFP8) in plain PyTorch.",
    epilog="Example: mokernels check ./Llama-3.1-8B-Instruct-FP8",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="PATH", help="Folder of a checkpoint, or a model of the Hugging Face hub."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, xpu; auto takes a GPU if any.")]


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="mokernels")


def _print_version(wanted: bool) -> None:
    if wanted:
        import mokernels

        typer.echo(f"mokernels {mokernels.__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Debug = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """NVIDIA ModelOpt checkpoints (FP8, NVFP4, MXFP8) in plain PyTorch."""
    context.obj = debug
