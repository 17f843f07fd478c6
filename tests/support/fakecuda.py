"""What Inductor would run on a CUDA device, seen without one: launches, source, compiled kernels.

Works with the CPU-only build of PyTorch. Nothing is executed: tensors are fake, and compilation
ends when the source of the wrapper is written. ::

    with fake_cuda((9, 0)):
        x = torch.empty(16, 4096, device="cuda", dtype=torch.bfloat16)
        assert launches(block, x) == ["triton_red_fused_0", "mokernels.fp8_gemm"]

This patches private names of PyTorch. Where one is missing ``fake_cuda`` fails and lists it.

Limits, all of the CPU-only build: indexing by tensors and constants that Inductor computes on the
device (the mask of an attention in plain operations) fail, and nothing can be tuned by measurement.
Test operators, blocks and layers with the attention replaced, not whole models.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor

from mokernels.ops.target import CUDA_TARGETS, Target
from tests.support.aot import Compiled
from tests.support.inductor_source import kernel_sources, launches_of
from tests.support.interpreter import interpreting
from tests.support.replaced_names import Replacement, clear_caches, owner_of, require

Capability = tuple[int, int]


@dataclass(frozen=True)
class Generated:
    """What Inductor wrote for one graph.

    Attributes:
        source: the Python source of the wrapper, with that of its Triton kernels.
        launches: what the wrapper launches, in order: names of Triton kernels
            (``triton_red_fused_add_0``), and of operators without the overload
            (``mokernels.fp8_gemm``, ``extern_kernels.mm``).
    """

    source: str
    launches: list[str]


@contextmanager
def fake_cuda(capability: Capability) -> Iterator[FakeTensorMode]:
    """One CUDA device of this compute capability, on which tensors can be made but not computed.

    Every tensor made inside is fake. On leaving, everything is as it was, and Dynamo's and
    Inductor's caches are empty.

    Args:
        capability: of a target that mokernels knows, for example ``(9, 0)``.

    Raises:
        ValueError: mokernels knows no such target.
        RuntimeError: this version of PyTorch or Triton lacks a name that has to be replaced.
    """
    import triton
    from torch._inductor import config

    properties = _properties(capability)
    replacements = _replacements(capability, properties)
    require(replacements)
    driver = SimpleNamespace(get_current_target=lambda: _gpu_target(capability))
    with ExitStack() as stack:
        stack.callback(clear_caches)
        for owner, name, replacement in replacements:
            stack.enter_context(mock.patch.object(owner_of(owner), name, replacement))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        stack.enter_context(_device_interface(capability, properties))
        stack.enter_context(_indexing())
        folder = stack.enter_context(TemporaryDirectory())
        folders = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        stack.enter_context(mock.patch.dict(os.environ, folders))
        stack.enter_context(config.patch(_settings()))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        clear_caches()
        yield stack.enter_context(FakeTensorMode())


def generate(
    function: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = False,
    passes: Any = None,
    options: Mapping[str, Any] | None = None,
    backend: str | Callable[..., Any] = "inductor",
) -> Generated:
    """Compile a function or module for the faked device, up to the source of its wrapper.

    To be called inside ``fake_cuda``; the graph must be in one piece and without gradients.

    Args:
        function: what ``torch.compile`` takes.
        args: its arguments, made inside ``fake_cuda``. ``torch._dynamo.mark_dynamic`` makes single
            dimensions dynamic.
        dynamic: as for ``torch.compile``.
        passes: for ``torch._inductor.config.post_grad_custom_pre_pass``.
        options: other settings of ``torch._inductor.config`` by name.
        backend: as for ``torch.compile``.

    Raises:
        RuntimeError: no source was written, or it has a call that is not understood.
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    require([("torch._inductor.graph.GraphLowering", "save_output_code", None)])
    settings = dict(options or {})
    if passes is not None:
        settings["post_grad_custom_pre_pass"] = passes
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    source = None
    with (
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(_stop)),
        config.patch(settings),
        torch.no_grad(),
    ):
        try:
            compiled(*args)
        except _Written as written:
            source = written.source
    if source is None:
        raise RuntimeError(
            "Inductor wrote no source: the function ran without a graph, or this version of "
            "PyTorch does not call GraphLowering.save_output_code"
        )
    return Generated(source, launches_of(source))


def launches(function: Callable[..., Any], *args: Any, **settings: Any) -> list[str]:
    """The ordered launches of a compiled function; arguments as for ``generate``."""
    return generate(function, *args, **settings).launches


def compile_kernels(source: str, capability: Capability) -> dict[str, list[Compiled]]:
    """Compile the Triton kernels of a wrapper to machine code, once for every configuration.

    Args:
        source: written by ``generate`` for the same capability.
        capability: of the device.

    Returns:
        for each kernel's name, what became of the configurations that Inductor would try.

    Raises:
        ValueError: the source was generated for another capability.
        RuntimeError: this process interprets kernels.
    """
    from torch._inductor.codecache import PyCodeCache

    if interpreting():
        raise RuntimeError("an interpreting process cannot compile: unset TRITON_INTERPRET")
    target = _target(capability)
    compiled = {}
    with fake_cuda(capability):
        for name, text in kernel_sources(source).items():
            autotuner = getattr(PyCodeCache.load(text), name)
            require([(autotuner, "_precompile_config", None)])
            results = [autotuner._precompile_config(config) for config in autotuner.configs]
            compiled[name] = [_compiled(name, result.kernel, target) for result in results]
    return compiled


def _compiled(name: str, kernel: Any, target: Target) -> Compiled:
    if kernel.metadata.target.arch != target.arch:
        raise ValueError(
            f"{name} was generated for sm_{kernel.metadata.target.arch}, not for {target.name}: "
            "the source holds the device's properties, generate it again"
        )
    return Compiled(
        name=name,
        target=target,
        ttgir=kernel.asm["ttgir"],
        ptx=kernel.asm["ptx"],
        amdgcn="",
        cubin=kernel.asm["cubin"],
        shared=kernel.metadata.shared,
    )


class _Written(BaseException):
    """Carries the source out of the compiler; no Exception, which the compiler would wrap."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source


def _stop(source: str) -> None:
    raise _Written(source)


def _settings() -> dict[str, Any]:
    """Inductor's: nothing kept, one process, and kernels that show their assembly."""
    from torch._inductor import config

    launchers = ("use_static_cuda_launcher", "use_static_triton_launcher")
    static = {name: False for name in launchers if hasattr(config, name)}
    # What a checkpoint loaded earlier has put into the hook is no part of a test's own settings.
    hook = {"post_grad_custom_pre_pass": None}
    return {"force_disable_caches": True, "compile_threads": 1, **hook, **static}


def _replacements(capability: Capability, properties: SimpleNamespace) -> list[Replacement]:
    def constant(value: Any) -> Callable[..., Any]:
        return lambda *args, **keywords: value

    return [
        ("torch.cuda", "is_available", constant(True)),
        ("torch.cuda", "is_initialized", constant(True)),
        ("torch.cuda", "device_count", constant(1)),
        ("torch.cuda", "current_device", constant(0)),
        ("torch.cuda", "get_device_properties", constant(properties)),
        ("torch.cuda", "get_device_capability", constant(capability)),
        ("torch.cuda", "get_rng_state", constant(torch.zeros(16, dtype=torch.uint8))),
        ("torch.cuda", "set_rng_state", constant(None)),
        ("torch.cuda", "synchronize", constant(None)),
        ("torch.cuda", "_lazy_init", constant(None)),
        ("torch.cuda", "_exchange_device", constant(0)),
        ("torch.cuda", "_maybe_exchange_device", constant(0)),
        ("torch.version", "cuda", "13.0"),
        ("torch.version", "hip", None),
        # Its patterns are traced from tensors made on the device.
        ("torch._inductor.fx_passes.joint_graph", "lazy_init", constant(None)),
        ("torch._inductor.runtime.triton_helpers", "set_driver_to_gpu", constant(None)),
    ]


@contextmanager
def _device_interface(capability: Capability, properties: SimpleNamespace) -> Iterator[None]:
    """Answers to Dynamo's and Inductor's questions about "cuda" and "cuda:0"."""
    from torch._dynamo import device_interface

    require([
        ("torch._dynamo.device_interface", "device_interfaces", None),
        ("torch._dynamo.device_interface", "CudaInterface", None),
    ])  # fmt: skip
    device_interface.get_interface_for_device("cuda")  # fills the table

    class Interface(device_interface.CudaInterface):
        class Worker(device_interface.CudaInterface.Worker):
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: properties)

        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        set_device = staticmethod(lambda device: None)
        exchange_device = staticmethod(lambda device: 0)
        maybe_exchange_device = staticmethod(lambda device: 0)
        synchronize = staticmethod(lambda device=None: None)
        get_raw_stream = staticmethod(lambda device: 0)
        get_device_properties = staticmethod(lambda device=None: properties)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)

    faked = {"cuda": Interface, "cuda:0": Interface}
    with mock.patch.dict(device_interface.device_interfaces, faked):
        yield


@contextmanager
def _indexing() -> Iterator[None]:
    """Indexing of tensors by numbers, slices, None and ... without a look at the device.

    C++ makes the device of an indexed tensor the current one, which the CPU-only build refuses.
    """
    with ExitStack() as stack:
        for tensor_class in (FakeTensor, FunctionalTensor):
            stack.enter_context(mock.patch.object(tensor_class, "__getitem__", _item, create=True))
        yield


def _item(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is ... or isinstance(part, _PLAIN_INDEX) for part in parts):
        return torch._C.TensorBase.__getitem__(tensor, index)
    if not any(part is ... for part in parts):
        parts = (*parts, ...)
    skipped = tensor.dim() - sum(part is not None and part is not ... for part in parts)
    result, dim = tensor, 0
    for part in parts:
        if part is None:
            result = result.unsqueeze(dim)
        elif isinstance(part, slice) and part != slice(None):
            span = (part.start, part.stop, part.step or 1)
            result = torch.ops.aten.slice.Tensor(result, dim, *span)
        elif not isinstance(part, slice) and part is not ...:
            result = result.select(dim, part)
            dim -= 1
        dim += skipped if part is ... else 1
    return result


_PLAIN_INDEX = (int, slice, torch.SymInt)


def _properties(capability: Capability) -> SimpleNamespace:
    """What ``torch.cuda.get_device_properties`` tells of the target."""
    target = _target(capability)
    return SimpleNamespace(
        name="NVIDIA fake",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=target.processors,
        shared_memory_per_block_optin=target.shared_memory,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=1536 if capability in ((8, 9), (12, 0)) else 2048,
        regs_per_multiprocessor=65536,
        warp_size=32,
        L2_cache_size=50 * 2**20,
        total_memory=80 * 2**30,
    )


def _target(capability: Capability) -> Target:
    known = {divmod(int(target.arch), 10): target for target in CUDA_TARGETS}
    if capability not in known:
        raise ValueError(f"no target of compute capability {capability}: wanted one of {[*known]}")
    return known[capability]


def _gpu_target(capability: Capability) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
