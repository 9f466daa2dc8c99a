"""Recipes and layouts that cannot be planned: one line for each fault, nothing that merely follows from it.

And what the plan shares with `reblock submit`.
"""

import subprocess
import sys

import pytest

from launch.cluster.options import JobConfig
from launch.main import main
from launch.plan import estimate
from launch.plan.hardware import Hardware
from tests.support.plans import CLIP, recipe


def together(size):
    """A batch over all ranks, which they must divide."""
    return {"batch_size": None, "global_batch_size": size}


@pytest.mark.parametrize("nodes", [0, -1])
def test_no_nodes_are_one_fault_in_one_line(tmp_path, capsys, nodes):
    options = [*recipe(tmp_path, data=together(64)), *CLIP, "--nodes", str(nodes)]
    with pytest.raises(ValueError, match="at least 1") as caught:
        estimate(options)
    assert str(caught.value) == f"got nodes {nodes}, expected at least 1; set --nodes."
    with pytest.raises(SystemExit) as left:
        main(["plan", *options])
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {caught.value}"


def test_devices_that_are_none_leave_the_batch_unblamed(tmp_path):
    options = [*recipe(tmp_path, data=together(63)), *CLIP, "--trainer.devices", "0"]
    with pytest.raises(ValueError, match=r"trainer\.devices") as caught:
        estimate(options, 2)
    assert len(str(caught.value).splitlines()) == 1


def test_all_faults_are_told_at_once(tmp_path):
    options = [*recipe(tmp_path, data=together(63)), *CLIP, "--trainer.precision", "16-mixed"]
    with pytest.raises(ValueError, match="global_batch_size 63 on 2 ranks") as caught:
        estimate(options, 2)
    assert "16-mixed" in str(caught.value)


def test_plan_and_submit_assume_the_same_gpu():
    assert JobConfig().gpu_memory == Hardware().memory_gib == 79


def test_the_options_of_submit_are_read_without_torch():
    """`reblock status` reads them too, and answers at once."""
    asked = "import sys, launch.cluster.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0
