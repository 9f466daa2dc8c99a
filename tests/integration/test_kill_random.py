"""`make kills` with few kills; docs/reliability.md has the figures of fifty."""

import pytest

from tests.kills.series import main


@pytest.mark.slow
def test_a_run_killed_at_random_is_the_run_that_was_not(capsys):
    main(["--kills", "3", "--ranks", "1", "--seed", "2"])
    said = capsys.readouterr().out
    assert "3 kills over a run of 48 steps on 1 rank(s), seed 2" in said and said.count("statuses [-9]") == 3
    zero = [
        "processes left over", "damaged files under a checkpoint's name", "steps lost",
        "rows of metrics.csv that differ", "steps with other samples, sigma, noise or losses",
        "files that differ or are left over",
    ]  # fmt: skip
    lines = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in said.splitlines() if "│" in line}
    assert {what: lines[what] for what in zero} == dict.fromkeys(zero, "0")
    assert int(lines["steps compared, all ranks"].split(",")[0]) >= 48
