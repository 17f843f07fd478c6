"""NVIDIA ModelOpt checkpoints (FP8, NVFP4, MXFP8) in plain PyTorch.

Importing this registers ``torch.ops.mokernels.*`` and, once transformers is imported, teaches it to
load ModelOpt checkpoints. It imports neither transformers nor triton, and asks no device anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mokernels.ops as _ops  # noqa: F401  (registers the operators)
from mokernels.checkpoint import check
from mokernels.checkpoint.dequantize import dequantize
from mokernels.checkpoint.load import load_into
from mokernels.errors import (
    ArgumentError,
    BackendError,
    CalibrationError,
    CheckpointError,
    Finding,
    MissingDependencyError,
    MokernelsError,
    UnsupportedFormatError,
)
from mokernels.hf import hook as _hook
from mokernels.invariance import batch_invariant
from mokernels.layers import explain

if TYPE_CHECKING:
    from mokernels.evaluate import Comparison
    from mokernels.hf.llm import LLM
    from mokernels.hf.quantizer import ModelOptConfig
    from mokernels.hf.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "ArgumentError",
    "BackendError",
    "CalibrationError",
    "CheckpointError",
    "Finding",
    "MissingDependencyError",
    "ModelOptConfig",
    "MokernelsError",
    "SamplingParams",
    "UnsupportedFormatError",
    "batch_invariant",
    "check",
    "compare",
    "convert",
    "dequantize",
    "explain",
    "export",
    "from_pretrained",
    "generate",
    "load_into",
    "quantize",
    "quantize_checkpoint",
    "release",
]


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    activations: str = "checkpoint",
    dtype: Any = "auto",
    device_map: Any = None,
    **options: Any,
) -> Any:
    """Load a ModelOpt checkpoint; see :func:`mokernels.hf.load.from_pretrained`."""
    from mokernels.hf.load import from_pretrained as load

    return load(path_or_id, activations=activations, dtype=dtype, device_map=device_map, **options)


def generate(
    model: Any,
    inputs: Any,
    *,
    compile: bool | str = "auto",
    cuda_graphs: bool | str = "auto",
    max_cache_len: int | None = None,
    **options: Any,
) -> Any:
    """Generate, compiled and with CUDA graphs; see :func:`mokernels.hf.generate.generate`."""
    from mokernels.hf.generate import generate as run

    ours: dict[str, Any] = {"compile": compile, "cuda_graphs": cuda_graphs}
    return run(model, inputs, max_cache_len=max_cache_len, **ours, **options)


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    text: str | None = None,
    weights: bool = True,
    predictions: bool = True,
    **options: Any,
) -> Comparison:
    """Compare a model with its quantization; see :func:`mokernels.evaluate.compare.compare`."""
    from mokernels.evaluate import compare as run

    return run(a, b, text=text, weights=weights, predictions=predictions, **options)


def release(model: Any) -> None:
    """Free what :func:`generate` keeps of a model; see :func:`mokernels.hf.decoding.release`."""
    from mokernels.hf.decoding import release as free

    free(model)


def quantize(
    model: Any,
    config: str | Mapping[str, Any],
    forward_loop: Any = None,
    *,
    exclude: Iterable[str] = (),
    kv_cache: str | None = None,
    observer: str | Mapping[str, Any] = "max",
    unseen: str | float = "error",
    resume: str | os.PathLike[str] | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    trainable: bool = False,
    progress: Any = True,
) -> Any:
    """Quantize a model in place, as ``mtq.quantize`` of ModelOpt does; it runs the real kernels.

    Everything that could make hours of calibration worthless is tried before: names, shapes,
    divisibility, weights, and with ``out_dir`` the disk. The model is changed once calibration has
    succeeded, one layer after the other.

    Args:
        model: of transformers, or any module with ``nn.Linear`` layers; also one whose layers
            accelerate keeps on the CPU or the disk (``device_map``).
        config: the name of a format ("FP8", "NVFP4", "MXFP8", "FP8_PER_CHANNEL_PER_TOKEN",
            "FP8_PB_WO"); patterns of module names with the format of each (the last that matches
            counts; None leaves a layer plain); or a configuration of ModelOpt's, such as
            ``mtq.NVFP4_DEFAULT_CFG``.
        forward_loop: for formats with calibrated activations (FP8, NVFP4) and KV caches: a function
            that is given the model and calls it on your data, or batches: dictionaries of
            arguments, tensors of ids [B, T], lists of ids; see :func:`mokernels.calibration.text`.
        exclude: patterns of module names that stay plain. ModelOpt's own exclusions (output
            layers, routers, vision towers, ...) hold besides.
        kv_cache: "FP8" or "NVFP4" to calibrate and store scales of the KV cache.
        observer: "max"; "percentile" or ``{"percentile": 99.9}``; "mse", the amax with the least
            squared error. Of activations; weights always go by their largest magnitude.
        unseen: what to do about layers that saw no data: "error" names them, "max" takes the
            largest amax of the other experts of the layer, or of the same projection elsewhere; a
            number is their amax.
        resume: a file that keeps what calibration has seen; a run that was interrupted goes on from
            it. Only with batches.
        out_dir: where you will export to, to be checked now.
        trainable: keep the float weights and round them, as well as the activations, in every
            call, so that the model can be fine-tuned (gradients go straight through the rounding;
            see :mod:`mokernels.ops.fake_quantize`). :func:`convert` or :func:`export` pack it.
        progress: whether to show progress bars.

    Returns:
        ``model``.

    Raises:
        ArgumentError: an argument is wrong, or the model cannot be quantized so.
        CalibrationError: no data, NaN, or a layer that saw none.
    """
    from mokernels.hf.quantize import quantize as run

    return run(
        model,
        config,
        forward_loop,
        exclude=exclude,
        kv_cache=kv_cache,
        observer=observer,
        unseen=unseen,
        resume=resume,
        out_dir=out_dir,
        trainable=trainable,
        progress=progress,
    )


def convert(model: Any, *, progress: Any = True) -> Any:
    """Pack a model that :func:`quantize` made with ``trainable=True``, with its current weights.

    The weights get the scales that :func:`quantize` would give them now; the activations keep the
    calibrated ones. The model changes in place and cannot be trained on; copy it if it should be.

    Args:
        model: any module; adapters that wrap its layers have to be merged first.
        progress: whether to show a progress bar.

    Returns:
        ``model``.

    Raises:
        ArgumentError: no layer is fake-quantized, or one that was is wrapped or replaced.
        CalibrationError: a weight holds NaN or infinities; nothing was changed.
    """
    from mokernels.hf.quantize import convert as run

    return run(model, progress=progress)


def quantize_checkpoint(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    config: str | Mapping[str, Any],
    *,
    exclude: Iterable[str] = (),
    max_shard_size: int | str = "10GB",
    device: Any = "cpu",
    progress: Any = True,
) -> Path:
    """Quantize a folder of plain weights that need not fit into memory, without its model.

    A few pieces of a tensor, of about 16 MiB each, are in memory at a time. Names and shapes
    decide what is a linear layer; everything that can be told from them is checked before anything
    is read or written. The result is that of :func:`quantize` and :func:`export`, to the byte of
    each tensor, if the weights are stored in the dtype that config.json gives;
    mokernels_report.json beside it has the signal to noise of every weight.

    Args:
        path: a folder of Hugging Face's layout: config.json and safetensors in bf16, fp16 or fp32.
        out_dir: to create; its parent has to exist.
        config: as for :func:`quantize`, for a format that needs no data:
            "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", or "FP8", whose activations are then
            quantized with a dynamic scale per token.
        exclude: patterns of module names that stay plain, beside ModelOpt's own exclusions.
        max_shard_size: bytes, or a text such as "10GB".
        device: where to compute.
        progress: whether to show a progress bar, or a function that is called with the number of
            tensors written, and of all.

    Returns:
        ``out_dir``, which appears only when it is complete and audited.

    Raises:
        ArgumentError: an argument is wrong, or the folder cannot be quantized so.
        CalibrationError: a weight is empty or holds NaN or infinities.
        CheckpointError: the files are broken, or the audit found errors.
        OSError: the disk is full, ...
    """
    from mokernels.ptq.stream import quantize_folder

    options: dict[str, Any] = {"exclude": exclude, "max_shard_size": max_shard_size}
    options["device"] = device
    if callable(progress):
        return quantize_folder(path, out_dir, config, progress=progress, **options)
    from tqdm.auto import tqdm

    with tqdm(desc="quantize tensors", dynamic_ncols=True, disable=not progress) as bar:

        def advance(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return quantize_folder(path, out_dir, config, progress=advance, **options)


def export(
    model: Any,
    out_dir: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "10GB",
    reload: bool = True,
) -> Path:
    """Write what :func:`quantize` made as a checkpoint of ModelOpt's, to the byte.

    vLLM, SGLang, TensorRT-LLM and mokernels load it. The folder appears only when it is complete,
    audited and, with ``reload``, loaded again and found to give the model's own logits.

    Args:
        model: a quantized model of transformers; a trainable one is packed in place first, by
            :func:`convert`.
        out_dir: to create; its parent has to exist.
        tokenizer: its files are written too; by default those of the folder that the model was
            loaded from.
        max_shard_size: as in transformers' ``save_pretrained``.
        reload: whether to load the checkpoint and compare; it takes the memory of a second model.

    Returns:
        The folder. Beside ModelOpt's files it holds ``mokernels_report.json``.

    Raises:
        ArgumentError: the model is no quantized one of transformers.
        CheckpointError: the folder exists and is not empty, or the audit found errors.
        MokernelsError: what was loaded again gives other logits; the message says why, if known.
        OSError: the disk is full, ...
    """
    from mokernels.hf.export import export as run

    return run(model, out_dir, tokenizer=tokenizer, max_shard_size=max_shard_size, reload=reload)


# Need transformers, which takes seconds to import.
_LATE = {
    "LLM": "mokernels.hf.llm",
    "ModelOptConfig": "mokernels.hf.load",
    "SamplingParams": "mokernels.hf.sampling",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_hook.install()
