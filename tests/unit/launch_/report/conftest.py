"""The run that the report's tests read."""

from pathlib import Path

import pytest

from tests.support.reported_run import write_planted_base, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "trial", write_planted_base(tmp_path / "base"))
