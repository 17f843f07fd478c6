"""The counters of split-K launches: zeros that a launch finds, and leaves.

The programs that share the K of a tile count themselves (kernels/reduce.py), and the last one sets
the counter back: no launch is needed to do so. One counter can serve any number of launches, but
not two at a time. So every counter has one owner:

* a stream, whose launches follow one another, owns counters for the largest of them;
* a launch that a CUDA graph captures owns its counters for good. They cannot be its stream's:
  graphs that were captured on one stream may be replayed on several at a time.

Owners take counters from a reserve of zeros, one for each device, and never give them back. It is
filled outside of captures, in which zeros would be a node of the graph and not be there before its
first replay. A launch that is captured when the reserve has too few left, as a process's first may
be, gets counters that are such a node: right, but no faster than a second launch.

A kernel that faults or is killed half way leaves counters that are not zero, in a context that
takes no further launch. One that could not be launched has not counted.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mokernels.ops.gemm_config import ceil_div

RESERVED = 1 << 17
"""Counters of a new reserve, of 4 bytes: for the launches of several captured decoding steps."""
LOW = RESERVED // 2
"""With fewer counters left a new reserve is made."""
OF_STREAM = 1 << 10
"""Fewest counters that a stream takes: few launches have more tiles whose K is shared."""
TOGETHER = 4
"""Counters are taken by 16 bytes: Triton compiles another kernel for an address between two
multiples of that, which in a capture would be the first time that it is compiled."""


class Counters:
    """Who owns which counters of one device.

    Args:
        device: where they are; the current one in every call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reserve = torch.empty(0, dtype=torch.int32)
        self._of_stream: dict[int, Tensor] = {}

    def for_launch(self, tiles: int) -> Tensor:
        """Int32 zeros, one for each tile or more, for the next launch on the current stream."""
        if not is_capturing(self._device):
            return self._of_current_stream(tiles)
        if self._reserve.numel() >= tiles:
            return self._take(tiles)
        return torch.zeros(tiles, dtype=torch.int32, device=self._device)

    def _of_current_stream(self, tiles: int) -> Tensor:
        wanted = max(tiles, OF_STREAM)
        if self._reserve.numel() < max(LOW, wanted):
            self._reserve = lasting_zeros(max(RESERVED, wanted), self._device)
        stream = current_stream(self._device)
        owned = self._of_stream.get(stream)
        if owned is None or owned.numel() < tiles:
            owned = self._of_stream[stream] = self._take(wanted)
        return owned

    def _take(self, count: int) -> Tensor:
        taken = self._reserve[:count]
        self._reserve = self._reserve[TOGETHER * ceil_div(count, TOGETHER) :]
        return taken


_LOCK = threading.Lock()
_COUNTERS: dict[torch.device, Counters] = {}


def counters_for(device: torch.device, tiles: int) -> Tensor:
    """Int32 zeros, one for each tile or more, for the next launch on the device's current stream.

    On the CPU, where the interpreter can be stopped half way, every launch has new ones.
    """
    if device.type in ("cpu", "meta"):
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    if device.index in (None, torch.accelerator.current_device_index()):
        return _of_current_device(device, tiles)
    with torch.accelerator.device_index(device.index):
        return _of_current_device(device, tiles)


def _of_current_device(device: torch.device, tiles: int) -> Tensor:
    with _LOCK:
        counters = _COUNTERS.get(device)
        if counters is None:
            counters = _COUNTERS[device] = Counters(device)
        return counters.for_launch(tiles)


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream records what it is given, instead of running it."""
    # Not every torch that we support has it for XPUs.
    ask = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return ask is not None and bool(ask())


def current_stream(device: torch.device) -> int:
    """What tells the device's current stream from its others."""
    stream: int = torch.accelerator.current_stream(device).stream_id
    return stream


def lasting_zeros(count: int, device: torch.device) -> Tensor:
    """Int32 zeros that are there for every stream, and outside of any pool of memory.

    A thread or a stream may be told to allocate from the pool of a CUDA graph (torch.compile does
    so when it warms one up), which takes back what it does not know. So these are made by a thread
    of their own, on the default stream.
    """

    def make() -> Tensor:
        with torch.accelerator.device_index(device.index):
            zeros = torch.zeros(count, dtype=torch.int32, device=device)
            torch.accelerator.current_stream(device).synchronize()
        return zeros

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
