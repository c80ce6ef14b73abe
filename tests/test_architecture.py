"""The layers, held by reading every file: imports go down only, and the core touches nothing but tensors."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("trainkit", "recipes")
# Bottom to top; a module imports from its own line and from those before it. What stands directly under trainkit/ and
# is not named here is a transform of steps, on the line of `step`.
LINES = (
    ("types", "tree", "rng", "parts"),
    ("state", "functional", "losses", "schedules", "metrics"),
    ("optim", "gradients", "accumulate"),
    ("step", "evaluate", "loop"),
    ("execution",),
    ("io",),
    ("trainer",),
)
RECIPES = len(LINES)
LINE_OF = {name: line for line, names in enumerate(LINES) for name in names}
CORE_TOP = LINE_OF["step"]
OUTSIDE = {"trainkit.io", "trainkit.execution", "trainkit.trainer", "torch.distributed"}
# Files, processes, terminal, network.
WORLD = {
    "asyncio", "io", "logging", "multiprocessing", "os", "pathlib", "shutil", "signal", "socket", "subprocess", "sys",
    "tempfile", "threading", "time", "urllib",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One imported module: where it stands, and who executes it: ``at`` import, on a "call", or for "types" only."""

    file: Path
    line: int
    target: str
    at: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.target}"


def sources(*packages: str) -> list[Path]:
    return sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sources(*PACKAGES)}


def line_of(module: str) -> int:
    package, _, rest = module.partition(".")
    if package == "recipes":
        return RECIPES
    # `import trainkit` itself gives everything that the core exports.
    return LINE_OF.get(rest.partition(".")[0], CORE_TOP)


def is_core(file: Path) -> bool:
    return module_name(file).startswith("trainkit") and line_of(module_name(file)) <= CORE_TOP


def imports(file: Path) -> Iterator[Import]:
    yield from _imports(file, ast.parse(file.read_text(encoding="utf-8")), "import")


def _imports(file: Path, node: ast.AST, at: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(file, child.lineno, alias.name, at) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{file.relative_to(ROOT)}:{child.lineno} is a relative import"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            # `from package import name` means the submodule where there is one of that name.
            targets = {name if name in MODULES else str(child.module) for name in names}
            yield from (Import(file, child.lineno, target, at) for target in sorted(targets))
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _imports(file, ast.Module(child.body, []), "types")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _imports(file, child, "call")
        else:
            yield from _imports(file, child, at)


def own_imports() -> list[Import]:
    """Imports of one file of ours by another that are executed."""
    found = [one for file in MODULES.values() for one in imports(file)]
    return [one for one in found if one.target.partition(".")[0] in PACKAGES and one.at != "types"]


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_imports_point_downwards() -> None:
    # An import for types only may name a record further up: nothing is executed by it.
    upward = [one for one in own_imports() if line_of(one.target) > line_of(module_name(one.file))]
    assert not upward, f"{upward[0]}, which is further up"


def test_no_two_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for one in own_imports():
        graph[module_name(one.file)].add(one.target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "a cycle: " + " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_submodule_needs_the_package_that_exports_it() -> None:
    # `from trainkit import x` inside the package works only as long as the order of its __init__ happens to fit.
    loops = [one for one in own_imports() if module_name(one.file).startswith(f"{one.target}.")]
    assert not loops, f"{loops[0]}, the package it is part of"


@pytest.mark.parametrize("file", [file for file in MODULES.values() if is_core(file)], ids=module_name)
class TestCore:
    def test_names_nothing_of_the_outer_layers(self, file: Path) -> None:
        # The package itself tells type checkers of the Trainer's names, which it loads when they are used.
        seen = [one for one in imports(file) if one.at != "types" or file != ROOT / "trainkit" / "__init__.py"]
        named = [one for one in seen if within(one.target, OUTSIDE)]
        assert not named, str(named[0])
        attributes = {
            f"{file.relative_to(ROOT)}:{node.lineno} names {ast.unparse(node)}"
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and within(ast.unparse(node), OUTSIDE)
        }
        assert not attributes, sorted(attributes)[0]

    def test_touches_no_file_process_or_terminal(self, file: Path) -> None:
        touched = [str(one) for one in imports(file) if one.target.partition(".")[0] in WORLD]
        touched += [
            f"{file.relative_to(ROOT)}:{node.lineno} calls {node.func.id}"
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("print", "open", "input")
        ]
        assert not touched, touched[0]

    def test_depends_on_torch_tensordict_and_einops_only(self, file: Path) -> None:
        allowed = {*sys.stdlib_module_names, "torch", "tensordict", "einops", "trainkit"}
        # A bridge to an optional library imports it when it is called.
        foreign = [one for one in imports(file) if one.target.partition(".")[0] not in allowed and one.at == "import"]
        assert not foreign, str(foreign[0])


@pytest.mark.parametrize(
    "file", sources(*PACKAGES, "benchmarks", "tests"), ids=lambda file: str(file.relative_to(ROOT))
)
def test_no_file_is_longer_than_500_lines(file: Path) -> None:
    # The Trainer's surface of 74 methods is one file; tests/trainer/test_surface.py keeps it thin.
    limit = 930 if module_name(file) == "trainkit.trainer.trainer" else 500
    length = len(file.read_text(encoding="utf-8").splitlines())
    assert length <= limit


@pytest.mark.parametrize("file", sources("recipes"), ids=module_name)
def test_no_recipe_is_longer_than_200_lines(file: Path) -> None:
    length = len(file.read_text(encoding="utf-8").splitlines())
    assert length <= 200


def loaded_by(code: str, cwd: Path = ROOT) -> set[str]:
    """The modules that are loaded in a fresh process after running ``code``."""
    program = f"{code}\nimport sys; print(chr(10).join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("statement", ["import trainkit", "from trainkit import Trainer, TrainingArguments"])
def test_an_import_loads_little_beside_torch(statement: str) -> None:
    added = loaded_by(statement) - loaded_by("import torch")
    assert "trainkit.step" in added
    # torch's compiler takes as long to load as all the rest, and comes with tensordict.
    late = {"torch._dynamo", "torch._inductor", "tensordict", "transformers", "datasets", "pyarrow", "optuna"}
    assert not sorted(name for name in added if within(name, late))


def test_the_core_loads_no_other_library() -> None:
    added = loaded_by("import trainkit") - loaded_by("import torch")
    packages = {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert packages <= {"trainkit", "einops", "torch"}


@pytest.mark.parametrize("recipe", [name for name in MODULES if name.startswith("recipes.")])
def test_importing_a_recipe_has_no_side_effects(recipe: str, tmp_path: Path) -> None:
    program = (
        f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); before = torch.get_rng_state()\n"
        f"import {recipe}\nassert torch.equal(before, torch.get_rng_state())"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
