"""The Slurm that these tests run on: `lab`, one for the whole session, and `lab_to_break`, healed after each test."""

from collections.abc import Iterator

import pytest

from tests.cluster.lab import Lab, why_not


@pytest.fixture(scope="session")
def _session_lab() -> Iterator[Lab]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    lab = Lab(SLURM_LAB_NODE_TIMEOUT="30")
    try:
        if lab.parameters["ISOLATION"] == "plain":
            pytest.skip("a Slurm lab needs process and host-name namespaces, which are not allowed here")
        yield lab
    finally:
        lab.down()


@pytest.fixture
def lab(_session_lab: Lab) -> Iterator[Lab]:
    """A two-node Slurm; see `tests.cluster.lab.Lab`. No job of a test outlives it."""
    yield _session_lab
    _session_lab.cancel_all()


@pytest.fixture
def lab_to_break(lab: Lab) -> Iterator[Lab]:
    """The lab for tests that kill nodes or cut networks: made whole again afterwards."""
    yield lab
    lab.heal()
