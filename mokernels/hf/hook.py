"""Registering with transformers when, and only when, a program imports it.

transformers has no plugin mechanism and takes seconds to import. So ``import mokernels`` puts a
finder on ``sys.meta_path`` that lets the modules below load as usual and then runs a callback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

CALLBACKS = {
    "transformers.configuration_utils": ("mokernels.hf.folders", "install"),
    "transformers.quantizers.auto": ("mokernels.hf.quantizer", "register"),
}
"""Module of transformers -> (module of ours, function to call once it is loaded)."""


def install() -> None:
    """Run each callback now, if its module is loaded, else when it is; safe to call twice."""
    waiting = [name for name in CALLBACKS if not _ready(name)]
    for name in CALLBACKS:
        if name not in waiting:
            _run_callback(name)
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _ready(name: str) -> bool:
    module = sys.modules.get(name)
    # A module that is being imported right now is listed but not finished.
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _run_callback(name: str) -> None:
    module, function = CALLBACKS[name]
    getattr(import_module(module), function)()


class _Finder(MetaPathFinder):
    """Finds the awaited modules by the other finders, and wraps their loader."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with a loader that runs the callback; None for all others."""
        if fullname not in CALLBACKS or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _CallbackLoader(spec.loader, lambda: _run_callback(fullname))
        return spec


class _CallbackLoader(Loader):
    """Loads as another loader does, then calls back."""

    def __init__(self, loader: Loader, callback: Callable[[], None]) -> None:
        self._loader = loader
        self._callback = callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the wrapped loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, give it its own loader back, call back."""
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._callback()

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)
