"""The bench that a GPU is: compiles in threads, runs and times one configuration at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mokernels.errors import BackendError
from mokernels.ops.gemm_config import GemmConfig
from mokernels.ops.target import Target, target_of
from mokernels.ops.tuned import forced
from mokernels.tuning.operands import draw_activations, draw_weight
from mokernels.tuning.search import Job, error_line

Seconds = Callable[[Callable[[], object]], float]
"""Takes a call, returns how many seconds one takes."""
MOST_COPIES = 64


class DeviceBench:
    """Implements :class:`mokernels.tuning.search.Bench`.

    Weights are rotated: as many copies as exceed the L2 cache four times, since a model that
    decodes reads each of its weights from memory.

    Args:
        device: a CUDA or ROCm device; a CPU under Triton's interpreter.
        target: by default the device's own.
        seconds: the clock; by default that of captured graphs.
        cache_bytes: of the L2 cache; by default the device's own.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        target: Target | None = None,
        seconds: Seconds | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.device = device
        self.target = target or target_of(device)
        self._clock = seconds or _graph_clock()
        self._cache_bytes = l2_bytes(device) if cache_bytes is None else cache_bytes
        self._job: Job | None = None
        self._weights: list[dict[str, Tensor]] = []
        self._inputs: list[Tensor] = []

    def prepare(self, job: Job) -> None:
        """Draw activations and as many weights as outgrow the cache."""
        self._weights, self._inputs = [], []  # before the next ones are drawn
        weight = draw_weight(job.product, self.device, seed=0)
        size = sum(tensor.nbytes for tensor in weight.values())
        copies = min(MOST_COPIES, 1 + 4 * self._cache_bytes // max(1, size))
        self._weights = [weight, *(_copied(weight) for _ in range(copies - 1))]
        self._inputs = [
            draw_activations(job.product, rows, self.device, seed=rows) for rows in job.rows
        ]
        self._job = job

    def compile(self, candidates: Sequence[GemmConfig]) -> dict[GemmConfig, str]:
        """Compile all of them, one thread for each core; those that cannot be, with the reason."""
        launches: dict[Any, tuple[GemmConfig, Any, bool]] = {}
        dependent = self.target.has_dependent_launch
        for config in candidates:
            with self._forced(config):
                for x in self._inputs:
                    for number, launch in enumerate(self._plan(x, self._weights[0])[1]):
                        found = (config, launch, dependent and number > 0)
                        launches.setdefault(launch.variant, found)
        threads = ThreadPoolExecutor(max_workers=os.cpu_count())
        try:
            jobs = [(c, threads.submit(self._compile, *how)) for c, *how in launches.values()]
            errors = [(config, job.exception()) for config, job in jobs]
        finally:
            threads.shutdown(cancel_futures=True)  # of an interrupted search
        return {config: error_line(error) for config, error in errors if error is not None}

    def result(self, config: GemmConfig) -> Tensor:
        """The products of all numbers of rows, one below the other."""
        with self._forced(config):
            return torch.cat([self._run(x, self._weights[0]) for x in self._inputs])

    def seconds(self, config: GemmConfig) -> float:
        """Time of one call, the mean over the numbers of rows."""
        with self._forced(config):
            times = [self._clock(self._calls(x)) / len(self._weights) for x in self._inputs]
        return sum(times) / len(times)

    @contextmanager
    def _forced(self, config: GemmConfig) -> Iterator[None]:
        assert self._job is not None  # prepare() comes first
        with torch.no_grad(), forced(self._job.key, config), on_device(self.device):
            yield

    def _calls(self, x: Tensor) -> Callable[[], object]:
        def run() -> None:
            for weight in self._weights:
                self._run(x, weight)

        return run

    def _run(self, x: Tensor, weight: dict[str, Tensor]) -> Tensor:
        from mokernels.ops.launch.plan import run

        return run(self._plan(x, weight))

    def _plan(self, x: Tensor, weight: dict[str, Tensor]) -> Any:
        from mokernels.ops.launch.layer import plan_layer

        assert self._job is not None
        product = self._job.product
        return plan_layer(product.format, product.activation, x, weight, target=self.target)

    def _compile(self, launch: Any, dependent: bool) -> None:
        with on_device(self.device):  # every thread has a current device of its own
            launch.compile(dependent)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the current one: graphs are captured, and kernels compiled, for that."""
    if device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return context


def l2_bytes(device: torch.device) -> int:
    """Size of the cache that the copies of a weight have to exceed."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def require_gpu(name: str) -> torch.device:
    """The device to measure.

    Args:
        name: ``auto``, ``cuda`` or ``cuda:1``.

    Raises:
        BackendError: there is none, or it is none whose time can be taken.
    """
    if name != "auto" and torch.device(name).type != "cuda":
        raise BackendError(
            f"`mokernels tune` measures kernels on a CUDA or ROCm device, and --device is {name!r}."
            " Leave it out, or name such a device; --dry-run only lists what would be measured."
        )
    if not torch.cuda.is_available():
        raise BackendError(
            "`mokernels tune` measures kernels on a GPU, and torch "
            f"{torch.__version__} finds none here. Run it on the machine that will run the model, "
            "or add --dry-run to list what it would measure."
        )
    if name in ("auto", "cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def _graph_clock() -> Seconds:
    from mokernels.ops.launch.timing import graph_seconds

    return graph_seconds


def _copied(weight: dict[str, Tensor]) -> dict[str, Tensor]:
    return {leaf: tensor.clone() for leaf, tensor in weight.items()}
