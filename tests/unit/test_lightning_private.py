"""Lightning's private parts are used in one module: a new version of Lightning can break that one only."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lightning
import pytest

import data
import launch
import trainer

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = "launch/fit/lightning_private.py"

#: (file, name) of uses elsewhere -> why they are there.
EXCEPTIONS = {
    ("data/modules/epoch_position.py", "_Loop"): "data may not import launch",
    ("data/modules/epoch_position.py", "_accelerator_connector"): "data may not import launch",
    ("trainer/module.py", "_trainer"): "`trainer` raises where there is none; trainer may not import launch",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> set[str]:
    """Private functions, classes and attributes that a file defines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if is_private(name)}


@cache
def of_lightning() -> frozenset[str]:
    """Private names that Lightning's source defines."""
    files = Path(lightning.__file__).parent.rglob("*.py")
    return frozenset(name for path in files for name in defined(ast.parse(path.read_text(encoding="utf-8"))))


def uses(source: str) -> Iterator[str]:
    """Private names of Lightning that a file imports, or reads from an object though it does not define them itself."""
    tree = ast.parse(source)
    own = defined(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr in of_lightning():
            of_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if of_super or node.attr not in own:
                yield node.attr


def files() -> dict[str, str]:
    paths = (path for package in ("data", "trainer", "launch") for path in sorted((ROOT / package).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def test_only_one_module_uses_private_parts_of_lightning():
    found = {(name, used) for name, source in files().items() if name != ALLOWED for used in uses(source)}
    assert found <= EXCEPTIONS.keys(), sorted(found - EXCEPTIONS.keys())


def classes() -> Iterator[type]:
    """Every class of ours."""
    for package in (data, trainer, launch):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name == "trainer.attention.triton_kernels":  # needs triton, and has no class
                continue
            module = importlib.import_module(info.name)
            yield from (c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == info.name)


def test_only_that_module_overrides_private_methods_of_lightning():
    found = set()
    for kind in classes():
        bases = [base for base in kind.__mro__ if base.__module__.split(".")[0] == "lightning"]
        private = {name for name, value in vars(kind).items() if is_private(name) and callable(value)}
        overridden = {name for name in private if any(name in vars(base) for base in bases)}
        found |= {(kind.__module__, kind.__name__, name) for name in overridden - {"_abc_impl"}}
    assert not [entry for entry in found if entry[0] != "launch.fit.lightning_private"], found


@pytest.mark.parametrize(
    "source",
    [
        "from lightning.pytorch.loops.loop import _Loop",
        "def f(trainer):\n    trainer._checkpoint_connector = 1",
        "def f(trainer):\n    return trainer.strategy._timeout",
        "class A(B):\n    def _save_checkpoint(self):\n        super()._save_checkpoint()",
        "class A(B):\n    def f(self):\n        return self._timeout",
    ],
)
def test_the_reader_catches(source: str):
    assert list(uses(source))


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def __init__(self):\n        self._timeout = 1\n    def f(self):\n        return self._timeout",
        "def f(parser):\n    return parser._nothing_of_lightning",
        "from lightning.pytorch import Trainer\nTrainer().__class__",
    ],
)
def test_the_reader_lets_pass(source: str):
    assert not list(uses(source))
