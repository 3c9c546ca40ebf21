"""Imports point one way, light modules import nothing heavy, and files are named for what they hold. All read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
SCRIPTS = SOURCE.parent / "scripts"

FLOORS = (
    {"errors", "spec", "units", "files"},
    {"builtin", "data", "layout", "methods", "metrics", "models", "objectives", "optim"},
    {"recipe"},
    {"training", "evaluation"},  # hooks evaluate, and evaluation knows nothing of training
    {
        "training.lr_find",
        "training.run",
        "training.record",
        "evaluation.evaluate",
        "evaluation.fingerprint",
        "evaluation.details",
        "evaluation.approaches",
        "training.smoke",
        "training.smoke_chain",
        "training.chain",
        "training.after",
        "exporting",
        "merging",
        "reporting",
        "serving",
    },
    {"cli"},
    {"__main__"},
)
LIGHT = ("errors", "spec", "units", "files", "cli", "data", "merging", "methods", "metrics", "objectives", "optim", "recipe")
# in a light room, but imported only where there is a model
TENSOR_CODE = (
    "ftcli.methods.adapter",
    *(f"ftcli.methods.bottleneck.{name}" for name in ("drop", "files", "layer", "mixture", "places", "tuner")),
    "ftcli.methods.factors",
    "ftcli.methods.feature_head",
    "ftcli.methods.joint_linear",
    "ftcli.methods.peft_merge",
    "ftcli.methods.rank_budget",
    *(f"ftcli.objectives.regularize.{name}" for name in ("divergence", "fisher", "pull", "start", "teacher")),
    "ftcli.optim.rules",
)
HEAVY = {
    *("accelerate", "bitsandbytes", "datasets", "matplotlib", "mlflow", "pandas", "peft", "pyarrow", "rich"),
    *("scipy", "sklearn", "tensorboard", "torch", "transformers", "wandb"),
}
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "base", "core", "misc"}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by dotted name, parsed."""
    found = {}
    for path in sorted((SOURCE / "ftcli").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imported_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Dotted names that one statement imports: modules, or names in modules."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, f"relative import in line {node.lineno}"
    return [f"{node.module}.{alias.name}" for alias in node.names]


def imports_of(tree: ast.AST, *, in_functions: bool, for_types: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import below `tree`; those under TYPE_CHECKING only `for_types`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, name) for name in imported_names(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not in_functions:
            continue
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not for_types:
            yield from imports_of(ast.Module(node.orelse, []), in_functions=in_functions, for_types=for_types)
        else:
            yield from imports_of(node, in_functions=in_functions, for_types=for_types)


def own_module(name: str) -> str | None:
    """The module of the package that defines `name`, None if another package does."""
    while name.startswith("ftcli"):
        if name in modules():
            return name
        name = name.rpartition(".")[0]
    return None


def floor_of(module: str) -> int:
    """The floor of the design that a module is on."""
    rest = module.removeprefix("ftcli.")
    for floor, rooms in reversed(list(enumerate(FLOORS))):
        if any(rest == room or rest.startswith(f"{room}.") for room in rooms):
            return floor
    raise AssertionError(f"{module} stands in no room of the design: add its room to FLOORS")


def is_light(module: str) -> bool:
    room = module.removeprefix("ftcli.").split(".")[0]
    return room in LIGHT and not module.startswith(TENSOR_CODE)


def test_imports_go_down() -> None:
    upward = [
        f"{module}:{line} imports {target}"
        for module, tree in modules().items()
        if module != "ftcli"
        for line, name in imports_of(tree, in_functions=True, for_types=True)
        if (target := own_module(name)) not in (None, "ftcli") and floor_of(str(target)) > floor_of(module)
    ]
    assert upward == []


def test_no_module_reaches_itself() -> None:
    graph = {
        module: {target for _, name in imports_of(tree, in_functions=True, for_types=False) if (target := own_module(name)) is not None}
        for module, tree in modules().items()
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_the_reader_of_imports_sees_them_all() -> None:
    tree = ast.parse(
        "import a.b\nif TYPE_CHECKING:\n    from c import d\nelse:\n    import e\nclass X:\n    import f\n"
        "    def g(self):\n        from h import i\ntry:\n    import j\nexcept ImportError:\n    pass\n"
    )
    assert [name for _, name in imports_of(tree, in_functions=False, for_types=False)] == ["a.b", "e", "f", "j"]
    assert [name for _, name in imports_of(tree, in_functions=True, for_types=True)] == ["a.b", "c.d", "e", "f", "h.i", "j"]


def test_light_modules_name_nothing_heavy_at_the_top() -> None:
    heavy = [
        f"{module}:{line} imports {name}"
        for module, tree in modules().items()
        if is_light(module)
        for line, name in imports_of(tree, in_functions=False, for_types=False)
        if name.split(".")[0] in HEAVY or name.startswith(TENSOR_CODE)
    ]
    assert heavy == []


def loaded_by(imported: list[str], watched: set[str]) -> list[str]:
    """Which of the `watched` modules a fresh interpreter has loaded after importing `imported`."""
    code = f"import sys\nfor name in {imported!r}:\n    __import__(name)\nprint(*sorted(set(sys.modules) & {watched!r}))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.split()


def test_light_modules_load_nothing_heavy() -> None:
    assert loaded_by([module for module in modules() if is_light(module)], HEAVY) == []


def test_the_command_line_loads_no_recipe_before_it_has_one() -> None:
    commands = [module for module in modules() if module.startswith("ftcli.cli")]
    assert loaded_by(commands, {"pydantic", "ftcli.recipe", "numpy", *HEAVY}) == []


def test_packages_hold_nothing_or_one_registration() -> None:
    for module, tree in modules().items():
        if not (SOURCE / module.replace(".", "/")).is_dir():
            continue
        rest = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
        assert [type(node) for node in rest] in ([], [ast.Assign]), f"{module}/__init__.py does more than register"
        assert rest or not tree.body, f"{module}/__init__.py imports without registering"


def test_files_are_named_for_what_they_hold() -> None:
    paths = [*(SOURCE / "ftcli").rglob("*"), *SCRIPTS.rglob("*.py")]
    assert [str(path) for path in paths if path.stem.lower() in NAMES_THAT_SAY_NOTHING] == []


def test_nothing_imports_scripts_or_tests() -> None:
    strangers = [
        f"{module}:{line} imports {name}"
        for module, tree in modules().items()
        for line, name in imports_of(tree, in_functions=True, for_types=True)
        if name.split(".")[0] in ("scripts", "tests")
    ]
    assert strangers == []
