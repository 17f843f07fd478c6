"""The commands and their options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from mokernels.cli.root import Checkpoint, Device, app
from mokernels.cli.support import FAILED, Debug, complain, pick_device, sentences, stderr, stdout


@app.command(epilog="Example: mokernels demo --format MXFP8 --output ./SmolLM2-135M-MXFP8")
@sentences
def demo(
    context: typer.Context,
    model: Annotated[
        Optional[str],  # noqa: UP045 (older versions of typer do not read str | None)
        typer.Option(
            help="Folder, .gguf file or hub name of an unquantized model; "
            "SmolLM2-135M-Instruct if not given."
        ),
    ] = None,
    format_name: Annotated[
        str, typer.Option("--format", help="Format to quantize to; every one is possible.")
    ] = "NVFP4",
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Keep the checkpoint in this folder."),
    ] = None,
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--prompt", "-p", help="What to ask the model."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 40,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Calibrate and quantize a small real model, export it, load that, ask it and measure it.

    Fails (exit code 1) if the quantized model's perplexity is more than 5 % (8 bits) or 75 % (4
    bits) above the original's.
    """
    from mokernels.demo import flow, report
    from mokernels.demo.source import find_source
    from mokernels.ptq.config import named_format

    format, place = named_format(format_name), pick_device(device)
    source = find_source(model, lambda text: stderr().print(text, style="dim"))
    stderr().print(f"model: {source.origin}", style="dim")
    request = flow.Request(source, format, output, prompt or flow.PROMPT, max_new_tokens, place)
    outcome = flow.run(request, report.RichReporter(stderr()))
    report.print_outcome(stdout(), outcome, format, place)
    if output is not None:
        stdout().print(f"The checkpoint is in {output}", markup=False)
    for problem in outcome.problems:
        complain(problem)
    if outcome.problems:
        raise typer.Exit(FAILED)


@app.command(epilog="Example: mokernels inspect ./Llama-3.1-8B-Instruct-NVFP4 --layers")
@sentences
def inspect(
    context: typer.Context,
    path: Checkpoint,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint holds: configuration, formats, layers, bytes. Reads no weights."""
    from mokernels.cli.inspect import print_inspection, summarize
    from mokernels.demo.hub import local_folder

    print_inspection(stdout(), summarize(local_folder(path)), layers=layers)


@app.command(epilog="Example: mokernels check ./Llama-3.1-8B-Instruct-FP8 --json")
@sentences
def check(
    context: typer.Context,
    path: Checkpoint,
    values: Annotated[
        str, typer.Option(help="What is read: all, scales, or none (only the headers).")
    ] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
    debug: Debug = False,
) -> None:
    """Audit a checkpoint, without a GPU or a model class; exit code 1 if it has errors."""
    from mokernels.cli.check import audited, print_report, report_json
    from mokernels.demo.hub import local_folder

    report = audited(local_folder(path), values)
    if as_json:
        typer.echo(report_json(report))
    else:
        print_report(stdout(), report)
    if not report.ok:
        raise typer.Exit(FAILED)


@app.command(epilog='Example: mokernels generate ./Llama-3.1-8B-Instruct-FP8 -p "Why is it dark?"')
@sentences
def generate(
    context: typer.Context,
    path: Checkpoint,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the model is to answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest share of tokens.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of what is not quantized: auto, bfloat16, float16, float32.")
    ] = "auto",
    activations: Annotated[
        str, typer.Option(help="checkpoint, 16bit, or fp8_block (for FP8_PB_WO).")
    ] = "checkpoint",
    chat: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="Use the chat template; by default where there is one."),
    ] = None,
    stream: Annotated[bool, typer.Option(help="Print the text as it is made.")] = True,
    compile: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="Compile the layers; by default on a GPU, with CUDA graphs."),
    ] = None,
    tokenizer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Folder or hub name, where the checkpoint has no tokenizer."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Load a checkpoint and continue a text or answer a message."""
    from mokernels.cli import generate as generation
    from mokernels.demo.hub import local_folder

    sampling = generation.Sampling(max_new_tokens, temperature, top_p, seed)
    place = generation.Placement(pick_device(device), dtype, activations, compile)
    text = generation.generate(
        local_folder(path), prompt, sampling, place, tokenizer=tokenizer, chat=chat, stream=stream
    )
    if not stream:
        typer.echo(text)


@app.command(epilog="Example: mokernels compare ./Llama-3.1-8B ./Llama-3.1-8B-NVFP4 --plot e.png")
@sentences
def compare(
    context: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", help="Folder or hub name of the reference.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another checkpoint of the same model.")],
    text: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File of a text to predict; without it one that comes with Python."),
    ] = None,
    weights: Annotated[bool, typer.Option(help="Compare the weights, layer by layer.")] = True,
    predictions: Annotated[bool, typer.Option(help="Compare the predictions of a text.")] = True,
    window: Annotated[int, typer.Option(min=2, help="Tokens that a model sees at once.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text, at most.")] = 8,
    device: Device = "auto",
    activations: Annotated[
        str, typer.Option(help="checkpoint, 16bit, or fp8_block (for FP8_PB_WO).")
    ] = "checkpoint",
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw the SQNR of every layer into this file (.png, .svg, .pdf)."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare a model with its quantization: SQNR, perplexity, KL divergence, greedy agreement."""
    from mokernels.cli import compare as printed
    from mokernels.demo.flow import quiet_transformers
    from mokernels.demo.hub import local_folder
    from mokernels.evaluate import compare as run_comparison
    from mokernels.evaluate import plot as plots

    if plot is not None:
        plots.require_matplotlib()
    with printed.progress_bars(stderr()) as progress, quiet_transformers():
        found = run_comparison(
            local_folder(a),
            local_folder(b),
            text=printed.read_text(text),
            weights=weights,
            predictions=predictions,
            window=window,
            windows=windows,
            device=pick_device(device),
            activations=activations,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        printed.print_comparison(stdout(), found, layers=layers)
    if plot is not None:
        plots.plot(found, plot)
        complain(f"The plot is in {plot}", "dim")


@app.command(epilog="Example: mokernels dequantize ./Llama-3.1-8B-NVFP4 ./Llama-3.1-8B-again")
@sentences
def dequantize(
    context: typer.Context,
    path: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    debug: Debug = False,
) -> None:
    """Write the plain checkpoint that a quantized one stands for, a layer in memory at a time."""
    from mokernels.checkpoint.dequantize import dequantize as write_plain
    from mokernels.cli.compare import progress_bars
    from mokernels.demo.hub import local_folder

    with progress_bars(stderr()) as progress:
        made = write_plain(
            local_folder(path), out, dtype=dtype, progress=lambda *count: progress("write", *count)
        )
    words = f"{made.layers} layers in {made.dtype}, {made.nbytes:,} bytes in all: {made.path}"
    stdout().print(words, markup=False, soft_wrap=True)
    if made.dropped:
        complain(
            f"{len(made.dropped)} scales of the KV cache were dropped: a plain checkpoint has no "
            "place for them.",
            "yellow",
        )
