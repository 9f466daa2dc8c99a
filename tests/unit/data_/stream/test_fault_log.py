"""The log of damage: each fault once, whoever meets it."""

import json

import pytest

from data.shards.format import Fault
from data.stream.fault_log import FaultLog, fault_file


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_fault_is_written_once_whoever_meets_it(tmp_path):
    path = fault_file(tmp_path / "run", 0)
    logs = [FaultLog(100, 0.05, path) for _ in range(3)]  # loader processes, and a resumed run
    for log in logs:
        log.add(Fault("clip-1", "is cut", "a.tar"))
    logs[1].add(Fault("clip-2", "ü", "a.tar"))
    assert lines(path) == [
        {"shard": "a.tar", "key": "clip-1", "reason": "is cut"},
        {"shard": "a.tar", "key": "clip-2", "reason": "ü"},
    ]


def test_faults_of_all_ranks_and_earlier_starts_count(tmp_path):
    for number in range(3):
        FaultLog(100, 0.03, fault_file(tmp_path, number)).add(Fault(f"clip-{number}", "x", "a.tar"))
    assert sorted(p.name for p in tmp_path.glob("faults*")) == [
        "faults-rank1.jsonl", "faults-rank2.jsonl", "faults.jsonl"]  # fmt: skip
    again = FaultLog(100, 0.03, fault_file(tmp_path, 1))
    again.add(Fault("clip-0", "x", "a.tar"))  # known, and not more than the share
    with pytest.raises(ValueError, match=r"4 of 100 samples.*0.03.*a.tar: clip-9: y.*faults\*.jsonl"):
        again.add(Fault("clip-9", "y", "a.tar"))


def test_half_a_line_of_a_killed_process_swallows_none(tmp_path):
    path = fault_file(tmp_path, 0)
    FaultLog(100, 1.0, path).add(Fault("clip-1", "x", "a.tar"))
    path.write_text(path.read_text() + '{"shard": "a.ta')
    for _ in range(2):
        FaultLog(100, 1.0, path).add(Fault("clip-2", "x", "a.tar"))
    found = path.read_text().splitlines()
    assert len(found) == 3 and found[1] == '{"shard": "a.ta' and json.loads(found[2])["key"] == "clip-2"
