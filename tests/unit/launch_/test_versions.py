"""What a run writes down of the software and hardware it ran on."""

import platform

from launch.versions import PACKAGES, versions


def test_versions_name_packages_hardware_and_command():
    found = versions()
    assert found["python"] == platform.python_version() and found["packages"].keys() == set(PACKAGES)
    assert found["packages"]["torch"] and found["hardware"]["cpu"] and found["command"]
