"""Families are known by name in few places: the rest of the code works with whatever is behind the interface."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAMILY = re.compile(r"mochi|hunyuan|cogvideo|(?<![a-z])wan(?![a-z])", re.IGNORECASE)
#: Where a family may be named, and why.
AT_HOME = {
    "trainer/models/": "the interface and its implementations",
    "data/families.py": "names, classes and sizes, for data",
    "data/base_facts.py": "what the parts of each family's folder say",
    "data/encode/": "encoders of clips and captions",
    "launch/sample/pipelines.py": "how each family's pipeline is asked for a video",
    "launch/study/text_tokens.py": "which features of a caption reach a model of each family, and where",
    "launch/demo/": "the demo's base is a small Mochi, which it makes from scratch",
    "launch/bench/step.py": "the timed model is a small Mochi",
    "launch/bench/full_size.py": "Mochi's config is the default",
}


def named(source: str) -> list[str]:
    """Identifiers and strings of code, without docstrings, that name a family."""
    tree = ast.parse(source)
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    found = []
    for node in ast.walk(tree):
        words: list[str] = []
        if isinstance(node, ast.Name):
            words = [node.id]
        elif isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.alias):
            words = [node.name]
        elif isinstance(node, ast.ImportFrom):
            words = [node.module or ""]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = [node.name]
        elif isinstance(node, ast.arg | ast.keyword):
            words = [node.arg or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            words = [node.value]
        found += [f"line {getattr(node, 'lineno', '?')}: {word[:60]}" for word in words if FAMILY.search(word)]
    return found


@pytest.mark.parametrize(
    "source, hits",
    [
        ("from data.families import MOCHI", 1),
        ("x = index_family(index)", 0),
        ('"""Mochi drops padded text."""\nx = 1  # as Mochi', 0),
        ('if family == "wan": pass', 1),
        ("f(hunyuan_video=1)", 1),
        ("wanted, wanting = 1, swan", 0),
        ("kind.SplitCogVideoX", 1),
    ],
)
def test_what_counts_as_a_name(source, hits):
    assert len(named(source)) == hits


def test_no_other_module_knows_a_family():
    known = {}
    for path in sorted(p for room in ("data", "trainer", "launch") for p in (ROOT / room).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        hits = named(path.read_text())
        if hits and not name.startswith(tuple(AT_HOME)):
            known[name] = hits
    assert known == {}
