"""The Triton kernels, interpreted on the CPU: against the dense float64 reference, and on known answers.

On a CUDA device the former run compiled: tests/gpu/test_attention.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    "tests",
    [
        ["tests/gpu/test_attention.py"],
        ["tests/unit/trainer_/attention/test_api_known_answers.py", "-k", "triton"],
        [
            "tests/unit/trainer_/callbacks/test_masking_known_answers.py",
            "tests/unit/trainer_/callbacks/test_sinks_known_answers.py",
            "-k",
            "triton",
        ],
    ],
    ids=["reference", "engine", "models"],
)
def test_the_kernels_interpreted(tests):
    # Whether kernels are interpreted is decided when they are imported, so they need a process of their own.
    pytest.importorskip("triton", reason="triton is made for Linux only")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.gpu.interpreter", *tests]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(dtype):
    # The interpreter takes what the compiler does not.
    triton = pytest.importorskip("triton", reason="triton is made for Linux only")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainer.attention import triton_kernels as kernels
    from trainer.attention.triton_launch import launch_shape

    given = {"Q": dtype, "K": dtype, "V": dtype, "OUT": dtype, "scale": "fp32"}
    floats = dict.fromkeys(("LSE", "TOP", "ENTROPY", "MASS", "LIMIT", "DROPPED", "T", "eps", "edges"), "fp32")
    whole = {"ABOVE": "i64", "REMOVED": "i64"}
    whole |= dict.fromkeys(("HEAVY", "ROWS", "COLS", "lengths", "counted", "protected"), "i32")
    for kind, kernel, constants in (
        ("row", kernels.row_kernel, {"WITH_ENTROPY": True}),
        ("key", kernels.key_kernel, {"WITH_MASS": True, "E": 5, "J": 9}),
        ("row", kernels.sample_kernel, {"BP": 64}),
        ("masked", kernels.masked_kernel, {"RENORMALISE": True, "TAIL": False}),
        ("masked", kernels.masked_kernel, {"RENORMALISE": False, "TAIL": True}),
    ):
        rows, keys, warps, stages = launch_shape(kind, float32=dtype == "fp32")  # as on the GPU itself
        tile = {"D": 128, "BD": 128, "BM": rows, "BN": keys, "NATIVE": True}
        constants |= {name: value for name, value in tile.items() if name in kernel.arg_names}
        pointers = {name: f"*{pointed}" for name, pointed in (given | floats | whole).items() if name != "scale"}
        kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(
            kernel, kinds | {"scale": "fp32"}, {(kernel.arg_names.index(n),): value for n, value in constants.items()}
        )
        made = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}
        )
        assert "wgmma" in made.asm["ptx"] or dtype == "fp32" or kernel is kernels.sample_kernel
        assert len(made.asm["cubin"]) > 1000
