"""The layout of the package: unique class names, the direction of imports, and the form of docstrings."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import bdh

PACKAGE = Path(bdh.__file__).parent
MODULES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
NOT_A_DESCRIPTION = re.compile(r"(What|Who|Whose|Where|How|When)\b")
# Packages that the modules of a package may import when they are loaded or run, besides base modules and themselves.
ALLOWED = {
    "model": {"data"},
    "distributed": {"model", "data"},
    "kernels": {"model", "distributed"},
    "data": set(),
    "report": {"training"},
    "evaluation": {"model", "data"},
    "insight": {"model"},
    "inference": {"model", "data", "distributed", "kernels", "insight"},
    "training": {"model", "data", "distributed", "kernels", "evaluation", "inference"},
    "serving": {"model", "data", "inference", "insight"},
}


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Yields the names of imported modules, without those for type checkers only."""
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            yield node.module
        nodes += ast.iter_child_nodes(node)


def test_no_class_name_is_used_twice() -> None:
    modules = defaultdict(list)
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                modules[node.name].append(path.name)
    assert not {name: paths for name, paths in modules.items() if len(paths) > 1}


def test_docstrings_begin_with_a_description() -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    wrong = [
        (path.name, docstring.splitlines()[0])
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node)) and NOT_A_DESCRIPTION.match(docstring)
    ]
    assert not wrong


@pytest.mark.parametrize("package", list(ALLOWED))
def test_imports_point_one_way(package: str) -> None:
    wrong = [
        (path.name, name)
        for path, tree in MODULES.items()
        if path.relative_to(PACKAGE).parts[0] == package
        for name in imports_of(tree)
        if name.startswith("bdh.")
        and (other := name.split(".")[1]) != package
        and (PACKAGE / other).is_dir()
        and other not in ALLOWED[package]
    ]
    assert not wrong


def test_writing_text_does_not_load_the_training_package() -> None:
    modules = "bdh.cli.generate, bdh.inference.llm"
    code = f"import sys, {modules}; sys.exit(any(name.startswith('bdh.training') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
