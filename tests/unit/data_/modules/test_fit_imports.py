"""A fit over latents needs no video library: nothing that it imports brings one along."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
#: Imports what `reblock fit --config recipes/demo.yaml` imports: the command, and every class that the recipe names.
SCRIPT = """
import importlib, sys
import yaml

def class_paths(node):
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "class_path")
        for value in node.values():
            yield from class_paths(value)
    elif isinstance(node, list):
        for value in node:
            yield from class_paths(value)

import launch.main, launch.fit.cli
with open("recipes/demo.yaml") as file:
    named = sorted(set(class_paths(yaml.safe_load(file))))
assert "data.modules.latents.LatentDataModule" in named
for name in named:
    module, _, attribute = name.rpartition(".")
    getattr(importlib.import_module(module), attribute)
print(*(name for name in sorted(sys.modules) if f"{name}.".startswith(("av.", "decord.", "data.video."))))
"""


def test_a_fit_over_latents_imports_no_video_library():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr
