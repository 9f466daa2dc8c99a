"""The Triton kernels, interpreted on the CPU: against the dense float64 reference, and on known answers.

On a CUDA device the former run compiled: tests/gpu/test_attention.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "tests",
    [
        ["tests/gpu/test_attention.py"],
        ["tests/unit/test_known_engine.py", "-k", "triton"],
        ["tests/unit/test_known_masking.py", "tests/unit/test_known_sinks.py", "-k", "triton"],
    ],
    ids=["reference", "engine", "models"],
)
def test_the_kernels_interpreted(tests):
    # Whether kernels are interpreted is decided when they are imported, so they need a process of their own.
    pytest.importorskip("triton", reason="triton is made for Linux only")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]
