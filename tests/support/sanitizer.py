"""Check every memory access of interpreted kernels: bounds, and races between programs.

The plain interpreter reads past the end of a tensor without a word, and often gets a plausible
result. ``install`` makes these accesses raise ``MemoryFault``:

* a load, store or atomic at an address that is no element of the tensor whose pointer it comes
  from. Elements are counted exactly: the gap between two rows of a strided view is out of bounds;
* a store to bytes that another program of the same launch has stored, or twice in one store;
* a load of bytes that another program of the same launch has stored.

The last two are allowed where the writer has released (an atomic with release semantics after its
store) and the reader has acquired (an atomic with acquire semantics): the way in which the last
program of a split-K reduction reads the others' partial sums. A relaxed atomic allows nothing.

Programs run one after the other here, so that only the addresses are checked: a race between the
threads of one program, or a missing barrier, is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


class MemoryFault(AssertionError):
    """An interpreted kernel touched memory that it must not touch."""


@dataclass(frozen=True)
class _Region:
    """The elements of one tensor argument.

    Attributes:
        start: address of its first byte.
        starts: for every byte from there on, whether an element starts at it.
        storage: address of the storage that it belongs to.
        name: for messages.
    """

    start: int
    starts: np.ndarray
    storage: int
    name: str

    def offsets(self, addresses: np.ndarray, kind: str, program: tuple[int, ...]) -> np.ndarray:
        """Byte offsets of the addresses; raises MemoryFault for those that are no element."""
        offsets = (addresses - np.uint64(self.start)).astype(np.int64)
        inside = (offsets >= 0) & (offsets < self.starts.size)
        legal = inside & self.starts[np.where(inside, offsets, 0)]
        if not legal.all():
            raise MemoryFault(
                f"{kind} out of bounds in program {program}: {int((~legal).sum())} of "
                f"{legal.size} addresses are no element of {self.name}; the first is at byte "
                f"{int(offsets[~legal][0])} of {self.starts.size}"
            )
        return offsets


@dataclass
class _Launch:
    """What the programs of one launch have stored so far.

    Every store has a number; ``writers[i]`` is the program of store i. A program's ``released`` is
    the number of stores at its last release.
    """

    regions: dict[object, _Region] = field(default_factory=dict)
    last_store: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    writers: list[tuple[int, ...]] = field(default_factory=list)
    released: dict[tuple[int, ...], int] = field(default_factory=dict)
    acquired: set[tuple[int, ...]] = field(default_factory=set)

    def check_visible(self, stores: np.ndarray, program: tuple[int, ...], kind: str) -> None:
        """The bytes' last stores are the program's own, or are synchronised with it."""
        for store in np.unique(stores[stores >= 0]):
            writer = self.writers[store]
            synchronised = program in self.acquired and store < self.released.get(writer, 0)
            if writer != program and not synchronised:
                raise MemoryFault(
                    f"race: program {program} {kind} bytes that program {writer} has stored in "
                    "the same launch"
                )


_launches: list[_Launch] = []


def install() -> None:
    """Watch every kernel launch of this interpreting process from now on; safe to call twice."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    if getattr(builder, "watched", False):
        return
    builder.watched = True
    builder.create_masked_load = _watched_load(builder.create_masked_load)
    builder.create_masked_store = _watched_store(builder.create_masked_store)
    builder.create_atomic_rmw = _watched_atomic(builder.create_atomic_rmw, mask_position=3)
    builder.create_atomic_cas = _watched_atomic(builder.create_atomic_cas, mask_position=None)
    interpreter._implicit_cvt = _marking(interpreter._implicit_cvt)
    executor.__call__ = _watched_launch(executor.__call__)
    executor._init_args_hst = _registering(executor._init_args_hst)


def _watched_launch(stock: Any) -> Any:
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        _launches.append(_Launch())
        try:
            return stock(self, *arguments, **keywords)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, MemoryFault):
                    raise cause from None
                cause = cause.__cause__
            raise
        finally:
            _launches.pop()

    return call


def _registering(stock: Any) -> Any:
    """Note the elements of every tensor argument, as the interpreter sees it."""

    def call(self: Any, arguments: Any, keywords: Any) -> Any:
        host_arguments, host_keywords = stock(self, arguments, keywords)
        names = list(self.arg_names)
        for index, tensor in enumerate(_tensors((*host_arguments, *host_keywords.values()))):
            name = names[index] if index < len(names) else "an argument"
            region = _region(tensor, f"argument {name} {tuple(tensor.shape)}")
            _launches[-1].regions[_key(tensor)] = region
            storage = tensor.untyped_storage()
            stores = np.full(storage.nbytes(), -1, np.int32)
            _launches[-1].last_store.setdefault(region.storage, (storage.data_ptr(), stores))
        return host_arguments, host_keywords

    return call


def _tensors(arguments: Any) -> Iterator[torch.Tensor]:
    from triton.runtime.jit import TensorWrapper

    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, TensorWrapper) or hasattr(argument, "block_shape"):
            yield from _tensors((argument.base,))
        elif isinstance(argument, torch.Tensor):
            yield argument


def _key(tensor: torch.Tensor) -> object:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _region(tensor: torch.Tensor, name: str) -> _Region:
    size = tensor.element_size()
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    elements = last + 1 if tensor.numel() else 0
    starts = torch.zeros(elements, size, dtype=torch.bool)
    if elements:
        starts[:, 0].as_strided(tensor.shape, [step * size for step in tensor.stride()]).fill_(True)
    address = tensor.untyped_storage().data_ptr()
    return _Region(tensor.data_ptr(), starts.reshape(-1).numpy(), address, name)


def _marking(stock: Any) -> Any:
    """Let a pointer remember its tensor: its type object travels with every address made of it."""

    def convert(argument: Any) -> Any:
        result = stock(argument)
        for tensor in _tensors((argument,) if hasattr(argument, "data_ptr") else ()):
            result.handle.dtype.region = _launches[-1].regions[_key(tensor)]
        return result

    return convert


def _addresses(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
    """The active addresses, flat, and the bytes of an element."""
    data = np.asarray(pointers.data, dtype=np.uint64)
    if mask is not None:
        active = np.broadcast_to(np.asarray(mask.data, dtype=bool), data.shape)
        data = data[active]
    return data.reshape(-1), max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _stores_of(pointers: Any, mask: Any, kind: str, program: tuple[int, ...]) -> Any:
    """The view into the store numbers of the accessed bytes: (array, indices [n, size]) or None."""
    addresses, size = _addresses(pointers, mask)
    if not addresses.size or not _launches:
        return None
    region = getattr(pointers.dtype, "region", None) or _region_of(addresses[0], kind, program)
    region.offsets(addresses, kind, program)
    start, stores = _launches[-1].last_store[region.storage]
    first = (addresses - np.uint64(start)).astype(np.int64)
    return stores, first[:, None] + np.arange(size)


def _region_of(address: np.uint64, kind: str, program: tuple[int, ...]) -> _Region:
    """The tensor that holds an address of unknown origin (an integer made a pointer)."""
    for region in _launches[-1].regions.values():
        if region.start <= int(address) < region.start + region.starts.size:
            return region
    raise MemoryFault(f"{kind} out of bounds in program {program}: the address is in no argument")


def _watched_load(stock: Any) -> Any:
    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        found = _stores_of(pointers, mask, "load", self.grid_idx)
        if found is not None:
            stores, indices = found
            _launches[-1].check_visible(stores[indices], self.grid_idx, "loads")
        return stock(self, pointers, mask, *rest, **keywords)

    return load


def _watched_store(stock: Any) -> Any:
    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        found = _stores_of(pointers, mask, "store", self.grid_idx)
        if found is not None:
            stores, indices = found
            launch = _launches[-1]
            launch.check_visible(stores[indices], self.grid_idx, "stores")
            if np.unique(indices).size != indices.size:
                raise MemoryFault(f"race: program {self.grid_idx} stores to one address twice")
            stores[indices] = len(launch.writers)
            launch.writers.append(self.grid_idx)
        return stock(self, pointers, value, mask, *rest, **keywords)

    return store


def _watched_atomic(stock: Any, mask_position: int | None) -> Any:
    from triton._C.libtriton import ir

    releasing = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
    acquiring = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)

    def atomic(self: Any, *arguments: Any) -> Any:
        # (op, pointers, value, mask, sem, scope) or (pointers, compare, value, sem, scope)
        pointers = arguments[0 if mask_position is None else 1]
        mask = None if mask_position is None else arguments[mask_position]
        _stores_of(pointers, mask, "atomic", self.grid_idx)
        if _launches and arguments[-2] in releasing:
            _launches[-1].released[self.grid_idx] = len(_launches[-1].writers)
        if _launches and arguments[-2] in acquiring:
            _launches[-1].acquired.add(self.grid_idx)
        return stock(self, *arguments)

    return atomic
