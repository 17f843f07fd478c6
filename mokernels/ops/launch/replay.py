"""Calls of operators that have been made before are made again without being checked or planned.

What an operator launches for given tensors follows from their dtypes, shapes, strides and addresses
modulo 16, from its other arguments, and from which configurations are in force: never from what the
tensors hold, which the host does not know. So the first such call is watched, and remembered as a
:class:`Recipe`: which tensors to allocate, which kernels to launch, and which argument of a kernel
is which argument of the operator. The next one allocates, and launches.

A call is remembered only if it is understood to the last argument. Each tensor that a kernel is
given has to lie at the address of one of the operator's, or of one that the call allocated, and
nothing may have been computed by torch on the way, a copy of an operand for instance. Large calls
are planned each time: the device is busy for longer than that takes.

The launches are those of :mod:`direct`, with its limits, and so is what goes the long way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mokernels.ops.launch.direct as direct
from mokernels.invariance import is_batch_invariant
from mokernels.ops import tuned

if TYPE_CHECKING:
    from mokernels.ops.launch.plan import Launch

Call = Callable[..., Any]

MOST = 1024
"""Calls of an operator that are remembered; beyond this many all of its are forgotten."""
MOST_ELEMENTS = 1 << 20
"""Elements of an operator's first argument up to which its calls are remembered: 64 rows of 16384,
and 256 of 4096."""

_EMPTY = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )
)


@dataclass(frozen=True)
class Step:
    """One launch of a recipe.

    Attributes:
        grid: number of programs along three axes.
        compiled: Triton's compiled kernel.
        groups: pick tuples of values, which are values from then on.
        arguments: picks the kernel's arguments from all values.
    """

    grid: tuple[int, int, int]
    compiled: Any
    groups: tuple[Callable[[Any], tuple[Any, ...]], ...]
    arguments: Callable[[Any], tuple[Any, ...]]


@dataclass(frozen=True)
class Recipe:
    """What a call does, without its tensors.

    Attributes:
        makes: make tensors: outputs, workspaces, counters.
        constants: other arguments of kernels.
        steps: the launches, in order.
        result: picks what is returned from all values.
        kernels: what is launched, as the author wrote it.
    """

    makes: tuple[Callable[[], Tensor], ...]
    constants: tuple[Any, ...]
    steps: tuple[Step, ...]
    result: Callable[[Any], Any]
    kernels: tuple[Any, ...]

    def __call__(self, args: tuple[Any, ...], stream: int) -> Any:
        """The operator's result; its launches go to this stream of the current device.

        All values are one list: the operator's arguments, what is made, the constants, and behind
        them each launch's tuples.
        """
        values = [*args]
        for make in self.makes:
            values.append(make())
        values += self.constants
        for step in self.steps:
            for group in step.groups:
                values.append(group(values))
            direct.launch_compiled(step.compiled, step.grid, stream, step.arguments(values))
        return self.result(values)


@dataclass
class Recording:
    """What a call did.

    Attributes:
        made: the tensors that it made, each with a function that makes one more; with None they are
            empty ones.
        launches: what it launched, each with its options.
        computed: whether torch computed something.
        paused: whether what torch is called for is the business of a function that makes a tensor.
    """

    made: list[tuple[Tensor, Callable[[], Tensor] | None]] = field(default_factory=list)
    launches: list[tuple[Launch, dict[str, Any]]] = field(default_factory=list)
    computed: bool = False
    paused: bool = False


class _Thread(threading.local):
    recording: Recording | None = None


_THREAD = _Thread()
_UNKNOWN: Any = ()


def remade(make: Callable[..., Tensor], *args: Any) -> Tensor:
    """``make(*args)``, which a replay calls again."""
    recording = _THREAD.recording
    if recording is None:
        return make(*args)
    recording.paused = True
    made = make(*args)
    recording.paused = False
    recording.made.append((made, partial(make, *args)))
    return made


def launched(launch: Launch, options: dict[str, Any]) -> None:
    """Tell whoever records this thread of a launch."""
    recording = _THREAD.recording
    if recording is not None:
        recording.launches.append((launch, options))


class Replayed:
    """An operator's implementation that remembers its calls.

    Args:
        call: checks the operator's arguments, of which the first is a tensor, plans and launches.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._recipes: dict[tuple[Any, ...], Recipe | None] = {}

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As the call itself; ``options`` are not the operator's, and make it be planned."""
        device = direct.current_device()
        if options or device_of(args[0]) != device or args[0].numel() > MOST_ELEMENTS:
            return self._call(*args, **options)
        key = _key(args, device)
        recipe = self._recipes.get(key, _UNKNOWN)
        if recipe is _UNKNOWN and not direct.go_through_triton(()):
            return self._record(key, args)
        if not recipe or direct.go_through_triton(recipe.kernels):
            return self._call(*args)
        return recipe(args, direct.current_stream(device))

    def _record(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        if _THREAD.recording is not None:
            return self._call(*args)
        recording = _THREAD.recording = Recording()
        try:
            with _Watch(recording):
                result = self._call(*args)
        finally:
            _THREAD.recording = None
        if len(self._recipes) >= MOST:
            self._recipes.clear()
        self._recipes[key] = understood(args, recording, result)
        return result


def device_of(x: Tensor) -> int:
    """The number of a tensor's device; negative on the CPU."""
    device: int = x.get_device()
    return device


def understood(args: tuple[Any, ...], recording: Recording, result: Any) -> Recipe | None:
    """The recipe of a call; None if there is something in it that is not understood.

    Args:
        args: of the operator.
        recording: what it did.
        result: a tensor, or a tuple of several.
    """
    outputs = result if isinstance(result, tuple) else (result,)
    launches, given = [launch for launch, _ in recording.launches], []
    for launch, options in recording.launches:
        found = direct.find(launch.kernel, launch.args, launch.constants, options)
        if found is None:
            return None
        given.append(found)
    if recording.computed:
        return None
    arguments = [(*launch.args, *last) for launch, (_, last) in zip(launches, given, strict=True)]
    made = [tensor for tensor, _ in recording.made]
    try:
        places = _places((*args, *made))
        values = _Values(places, len(args) + len(made), arguments)
        steps = [
            Step(launch.grid, compiled, *values.pick(taken))
            for launch, (compiled, _), taken in zip(launches, given, arguments, strict=True)
        ]
        returned = [places[output.data_ptr()] for output in outputs]
        makes = [_make(*pair, outputs) for pair in recording.made]
    except LookupError:
        return None
    if min(returned) < len(args):
        return None
    return Recipe(
        tuple(makes),
        tuple(values.constants),
        tuple(steps),
        itemgetter(*returned),
        tuple(launch.kernel for launch in launches),
    )


def _key(args: tuple[Any, ...], device: int) -> tuple[Any, ...]:
    """What a call's launches follow from. A tensor is told by four items, others by themselves."""
    told: list[Any] = [device, tuned.edition(), is_batch_invariant()]
    for argument in args:
        if isinstance(argument, Tensor):
            told.append(argument.dtype)
            told.append(argument.shape)
            told.append(argument.stride())
            told.append(argument.data_ptr() & 15)
        else:
            told.append(argument)
    return tuple(told)


def _places(values: tuple[Any, ...]) -> dict[int, int]:
    """Which tensor is at an address.

    Raises:
        LookupError: two are, or one is nowhere, being empty.
    """
    places: dict[int, int] = {}
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            address = value.data_ptr()
            if address == 0 or address in places:
                raise LookupError
            places[address] = place
    return places


def _make(
    made: Tensor, make: Callable[[], Tensor] | None, outputs: tuple[Tensor, ...]
) -> Callable[[], Tensor]:
    """Makes one more such tensor, of the dtype in which it is returned."""
    if make is not None:
        return make
    address = made.data_ptr()
    made = next((output for output in outputs if output.data_ptr() == address), made)
    like = {"dtype": made.dtype, "device": made.device}
    if made.is_contiguous():
        return partial(torch.empty, tuple(made.shape), **like)
    return partial(torch.empty_strided, tuple(made.shape), made.stride(), **like)


def _leaves(items: tuple[Any, ...]) -> Iterator[Any]:
    """Items, and those of tuples among them."""
    for item in items:
        if type(item) is tuple:
            yield from _leaves(item)
        else:
            yield item


class _Watch(TorchDispatchMode):
    """Sees what torch is called for: to allocate, to view, or to compute."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        recording = self._recording
        if recording.paused:
            return result
        if func in _EMPTY:
            recording.made.append((result, None))
        elif not func.is_view:
            recording.computed = True
        return result


class _Values:
    """Places in the list of a recipe's values.

    Args:
        places: of tensors, by their addresses.
        tensors: how many values come before the constants.
        arguments: of each launch.
    """

    def __init__(
        self, places: dict[int, int], tensors: int, arguments: list[tuple[Any, ...]]
    ) -> None:
        self._places = places
        leaves = (leaf for taken in arguments for leaf in _leaves(taken))
        self.constants = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        self._constant = tensors
        self._group = tensors + len(self.constants)

    def pick(self, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
        """What picks the tuples among a launch's arguments, and what picks the arguments.

        Raises:
            KeyError: a tensor is none of those that are known.
        """
        groups: list[Any] = []
        places = [self._place(item, groups) for item in arguments]
        return tuple(groups), itemgetter(*places)

    def _place(self, item: Any, groups: list[Any]) -> int:
        if isinstance(item, Tensor):
            return self._places[item.data_ptr()]
        if type(item) is tuple:
            groups.append(itemgetter(*(self._place(part, groups) for part in item)))
            self._group += 1
            return self._group - 1
        self._constant += 1
        return self._constant - 1
