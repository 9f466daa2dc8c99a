"""Imports point one way: launch -> trainer, data; data takes nothing of ours.

Of data, trainer takes the batch type and two modules that know nothing of data sets: the file writer and the look-up of
a base.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("data", "trainer", "launch", "tests")

#: Prefix of the importing module -> prefixes of our modules that it may import. The longest prefix that fits counts.
ALLOWED: dict[str, tuple[str, ...]] = {
    "data": ("data",),
    "data.batch": (),  # what trainer takes of data stands alone
    "data.files": (),
    "data.families": (),
    "data.base_folder": (),
    "trainer": ("trainer", "data.batch", "data.files", "data.base_folder"),
    "trainer.attention": ("trainer.attention",),  # pure: no architecture, no callback
    "trainer.models": ("trainer.models", "trainer.attention", "data.batch", "data.base_folder"),
    "launch": ("launch", "trainer", "data"),
}

#: Third-party packages that a room must do without.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "": ("pickle", "dill", "cloudpickle", "shelve"),
    "data": ("diffusers.models.transformers",),
    "trainer.attention": ("diffusers", "transformers", "lightning", "wandb", "matplotlib"),
    "trainer.models": ("lightning", "wandb", "matplotlib"),
}


def imports(source: str, module: str) -> Iterator[str]:
    """Dotted names that `source` imports, wherever in the file; `from a import b` gives `a.b`."""
    package = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: -node.level] if node.level else []
            stem = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def faults(source: str, module: str) -> list[str]:
    """Imports of `source`, standing as `module`, that the rules forbid."""
    rule = max((prefix for prefix in ALLOWED if within(module, (prefix,))), key=len)
    forbidden = tuple(
        name for room, names in FORBIDDEN.items() if not room or within(module, (room,)) for name in names
    )
    return [
        f"{module} imports {name}"
        for name in imports(source, module)
        if (within(name, OURS) and not within(name, ALLOWED[rule])) or within(name, forbidden)
    ]


def modules() -> dict[str, Path]:
    files = (path for package in ("data", "trainer", "launch") for path in sorted((ROOT / package).rglob("*.py")))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def test_imports_point_one_way():
    found = [fault for module, path in modules().items() for fault in faults(path.read_text(), module)]
    assert not found, "\n".join(found)


def test_every_room_was_read():
    assert {"data.batch", "trainer.module", "trainer.attention.api", "trainer.models.mochi", "launch.main"} <= set(
        modules()
    )


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.pack.command", "from trainer.objective import Flow"),
        ("data.pack.command", "def f():\n    import launch.main"),
        ("trainer.module", "from data.stream.latents import LatentReader"),
        ("trainer.module", "import data"),
        ("trainer.module", "from launch import main"),
        ("trainer.attention.api", "from trainer.models import mochi"),
        ("trainer.attention.api", "from ..callbacks import sinks"),
        ("trainer.attention.api", "from diffusers import MochiPipeline"),
        ("trainer.models.mochi", "import trainer.module"),
        ("data.pack.command", "import pickle"),
        ("data.files", "from data.batch import Batch"),
        ("trainer.attention.rows", "from data.files import write_text"),
    ],
)
def test_the_reader_catches(module: str, source: str):
    assert faults(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trainer.module", "from data.batch import Batch"),
        ("trainer.graft", "from data.files import atomic_file"),
        ("trainer.models.load", "from data.base_folder import resolve_base"),
        ("trainer.callbacks.sinks", "from trainer.attention import sink_statistics"),
        ("launch.main", "import data.synth.command, trainer.module"),
        ("data.stream.latents", "from data.batch import Sample\nimport datasets"),
    ],
)
def test_the_reader_lets_pass(module: str, source: str):
    assert not faults(source, module)
