"""The commands and their options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from mokernels.cli.support import FAILED, Debug, complain, pick_device, sentences, stderr, stdout

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


@app.command(
    epilog="Example: mokernels quantize ./Qwen3-8B --format NVFP4 --calib text.jsonl -o ./out"
)
@sentences
def quantize(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub name of an unquantized model.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")],
    format_name: Annotated[
        str,
        typer.Option("--format", help="Format; `mokernels demo` lists them."),
    ] = "NVFP4",
    calib: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Text to calibrate with, .txt or .jsonl; for FP8, NVFP4, KV caches."),
    ] = None,
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Pattern of module names that stay plain; may be repeated."),
    ] = None,
    kv_cache: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="FP8 or NVFP4: calibrate scales of the KV cache too."),
    ] = None,
    observer: Annotated[str, typer.Option(help="max, percentile or mse.")] = "max",
    unseen: Annotated[
        str, typer.Option(help="Layers without data: error, max, or an amax.")
    ] = "error",
    resume: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Keep what calibration has seen in this file, and go on from it."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of the text.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sample.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 4,
    evaluate: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Text, held back, to compare on; Python's own pages if not given."),
    ] = None,
    compare_models: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Compare with the original model.")
    ] = True,
    device: Device = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Quantize a model; vLLM, SGLang, TensorRT-LLM and mokernels load the checkpoint."""
    from mokernels.cli import quantize as ptq
    from mokernels.demo.hub import local_folder

    task = ptq.Task(
        model=str(local_folder(model)),
        output=output,
        format=format_name,
        calib=calib,
        exclude=tuple(exclude or ()),
        kv_cache=kv_cache,
        observer=observer,
        unseen=unseen,
        resume=resume,
        samples=samples,
        length=length,
        batch_size=batch_size,
        device=pick_device(device),
        evaluate=evaluate,
        compare=compare_models,
        trust_remote_code=trust_remote_code,
    )
    record = ptq.quantize(task, stderr())
    ptq.print_record(stdout(), record, output)


@app.command(epilog="Example: mokernels tune ./Llama-3.1-8B-Instruct-FP8 --dry-run")
@sentences
def tune(
    context: typer.Context,
    path: Checkpoint,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be measured; needs no GPU.")
    ] = False,
    device: Annotated[str, typer.Option(help="cuda, cuda:1; auto takes the current GPU.")] = "auto",
    target: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --dry-run: a GPU to plan for, sm_90 for example."),
    ] = None,
    activations: Annotated[
        str, typer.Option(help="checkpoint, 16bit, or fp8_block (for FP8_PB_WO).")
    ] = "checkpoint",
    again: Annotated[
        bool, typer.Option("--again", help="Measure also what was measured before.")
    ] = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Write this file, not the one that runs pick up."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure which launch configurations are fastest for a checkpoint's shapes on this GPU.

    Later runs pick the winners up from the user's cache folder. No bit of a result changes.
    """
    from mokernels.cli import tune as tuning
    from mokernels.demo.hub import local_folder

    planned = tuning.target_to_plan_for(dry_run, device, target)  # before a checkpoint is fetched
    found = tuning.products(local_folder(path), activations)
    if dry_run:
        tuning.print_plan(stdout(), found, planned)
        return
    file, outcome, kept = tuning.tune(found, device, output, again, stderr())
    tuning.print_outcome(stdout(), file, outcome, kept)
    if outcome.interrupted:
        raise typer.Exit(FAILED)


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
