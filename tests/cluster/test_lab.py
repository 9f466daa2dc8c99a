"""The lab is what the other tests take it for: two nodes apart from each other, whose deaths and networks are real."""

import pytest

pytestmark = pytest.mark.slow

SLEEP = "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --requeue\nsrun sleep 600\n"


def test_each_node_is_a_host_of_its_own(lab):
    job = lab.submit("#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1\nsrun bash -c 'hostname; hostname -i'\n")
    lab.wait(job, "COMPLETED")
    printed = lab.output(job).split()
    assert {"node1", "node2"} <= set(printed) and len(set(printed)) == 4, printed
    assert lab.job(job)["NodeList"] == "node[1-2]" and lab.job(job)["Restarts"] == "0"


def test_a_failed_job_is_failed(lab):
    job = lab.submit("#!/bin/bash\nexit 3\n")
    lab.wait(job, "FAILED")
    assert lab.job(job)["ExitCode"] == "3:0"
    with pytest.raises(AssertionError, match="FAILED, not"):
        lab.wait(job, "COMPLETED")


def test_a_nodes_daemon_dies_alone_and_comes_back(lab_to_break):
    lab = lab_to_break
    job = lab.submit(SLEEP)
    lab.wait(job, "RUNNING")
    lab.until(lambda: len(lab.processes("node2", "sleep", "600")) == 1, "the task")
    task = lab.processes("node2", "sleep", "600")
    lab.kill_slurmd("node2")
    lab.until(lambda: not lab.processes("node2", "slurmd", "-N"), "the daemon's end")
    assert lab.processes("node2", "sleep", "600") == task
    lab.heal()
    assert lab.processes("node2", "slurmd", "-N") and not lab.processes("node2", "sleep", "600")


def test_a_cut_network_loses_packets_and_heals(lab_to_break):
    lab = lab_to_break

    def reaches(node, other):
        address = f"{lab.parameters['SUBNET']}.{lab.nodes.index(other) + 1}"
        port = int(lab.parameters["PORT"]) + lab.nodes.index(other) + 1
        return lab.on(node, "timeout", "2", "bash", "-c", f": </dev/tcp/{address}/{port}", check=False).returncode == 0

    assert reaches("node1", "node2")
    lab.cut("node1", "node2")
    assert not reaches("node1", "node2")
    assert lab.on("node1", "scontrol", "ping").stdout.count("UP") == 1  # the controller is still reached
    lab.mend("node1", "node2")
    assert reaches("node1", "node2")
    lab.cut("node2")
    assert not reaches("node1", "node2")
    assert lab.on("node2", "timeout", "5", "scontrol", "ping", check=False).stdout.count("UP") == 0
