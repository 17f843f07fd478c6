"""The layers of the code: a module imports only from what stands above it; no cycles."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mokernels"

# Top to bottom: a module may import from its own room and from the rooms above it.
ROOMS = [
    "errors",
    "formats",
    "settings",
    "invariance",
    "numerics",
    "ops",
    "compile",
    "layers",
    "checkpoint",
    "tuning",
    "calibration",
    "ptq",
    "hf",
    "demo",
    "evaluate",
    "cli",
    "__main__",
]
ONLY_IN = {
    "triton": ("ops/kernels", "ops/launch"),
    "transformers": ("hf", "demo", "cli"),
    "typer": ("cli",),
    "rich": ("cli", "demo"),
    "matplotlib": ("evaluate",),
}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path, *, anywhere: bool = True) -> set[str]:
    """Full names that a file imports; ``anywhere`` includes imports inside functions."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    nodes = ast.walk(tree) if anywhere else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(module: str) -> int:
    return ROOMS.index(module.split(".")[1])


@pytest.mark.parametrize("name", [n for n in MODULES if n != "mokernels"])
def test_imports_go_upwards(name):
    for target in imports(MODULES[name]):
        if target.startswith("mokernels.") and target.split(".")[1] in ROOMS:
            assert room(target) <= room(name), f"{name} imports {target}, which stands below it"


@pytest.mark.parametrize("package", ONLY_IN)
def test_heavy_packages_are_imported_in_their_room_only(package):
    for name, path in MODULES.items():
        inside = path.relative_to(PACKAGE).as_posix().startswith(ONLY_IN[package])
        if not inside:
            heavy = {i for i in imports(path) if i.split(".")[0] == package}
            assert not heavy, f"{name} imports {heavy}"


def test_there_are_no_import_cycles():
    graph = {
        name: {t for t in imports(path, anywhere=False) if t in MODULES and t != name}
        for name, path in MODULES.items()
        if name != "mokernels"
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_files_stay_readable():
    limits = {"kernels": 500}
    for path in PACKAGE.rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= limits.get(path.parent.name, 400), f"{path.name} has {lines} lines"
