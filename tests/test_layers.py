"""Imports point down the layers of ARCHITECTURE.md, and no files or folders import each other in a
circle.

Imports inside functions count, and those under `if TYPE_CHECKING` too: whoever reads one file of a
circle has to read the others.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

# begins the line of ARCHITECTURE.md that names all layers, the lowest first
ORDER = "    posttrain.backend < "
LAYERS = next(line for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines() if line.startswith(ORDER)).split()[
    ::2
]
PATHS = [
    path.relative_to(ROOT) for top in {name.split(".")[0] for name in LAYERS} for path in (ROOT / top).rglob("*.py")
]
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in PATHS}


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative imports are not followed here"
            names |= {
                submodule if (submodule := f"{node.module}.{a.name}") in MODULES else str(node.module)
                for a in node.names
            }
    return names & MODULES.keys()


IMPORTS = {module: imports(path) for module, path in MODULES.items()}


def folder(module: str) -> str:
    return ".".join(MODULES[module].parent.parts)


def height(module: str) -> int:
    """The place of its layer, the innermost that has it; ValueError for a module of no layer."""
    within = [name for name in LAYERS if f"{module}.".startswith(f"{name}.")]
    return LAYERS.index(max(within, key=len))


@pytest.mark.parametrize("unit", [str, folder], ids=["files", "folders"])
def test_nothing_imports_in_a_circle(unit) -> None:  # noqa: ANN001
    graph: dict[str, set[str]] = {}
    for module, imported in IMPORTS.items():
        graph.setdefault(unit(module), set()).update({unit(name) for name in imported} - {unit(module)})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")


def test_imports_point_down() -> None:
    upward = [f"{m} -> {name}" for m, imported in IMPORTS.items() for name in imported if height(name) > height(m)]
    assert not upward


def test_environments_implement_types_and_import_no_loop() -> None:
    loops = [f"{m} -> {name}" for m in IMPORTS if m.startswith("envs.") for name in IMPORTS[m] if ".train" in name]
    assert not loops
