"""The commands that make something of a model: a checkpoint, a table of launches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mokernels.cli.root import Checkpoint, Device, app
from mokernels.cli.support import FAILED, Debug, pick_device, sentences, stderr, stdout


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
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Weights alone, a piece in memory at a time, without the model's class: for "
            "formats without calibration, and FP8 with a scale per token.",
        ),
    ] = False,
    device: Device = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Quantize a model; vLLM, SGLang, TensorRT-LLM and mokernels load the checkpoint."""
    from mokernels.cli import quantize as ptq
    from mokernels.demo.hub import local_folder

    if stream:
        needing = {
            "--calib": calib,
            "--kv-cache": kv_cache,
            "--resume": resume,
            "--evaluate": evaluate,
        }
        ptq.check_stream([option for option, value in needing.items() if value is not None])
        where = pick_device(device)
        ptq.stream(str(local_folder(model)), output, format_name, exclude, where)
        stdout().print(f"The checkpoint is in {output}", markup=False, soft_wrap=True)
        return
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
