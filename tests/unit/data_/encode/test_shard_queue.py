"""Where the processes of a job begin in the queue of shards."""

from data.encode.shard_queue import start_position


def test_processes_of_a_job_begin_at_different_shards():
    def first(**environment):
        return start_position(1000, {name: str(value) for name, value in environment.items()})

    for starts in (
        [first(SLURM_ARRAY_TASK_ID=task) for task in range(8)],
        [first(SLURM_PROCID=rank, SLURM_NTASKS=8) for rank in range(8)],
        [first(RANK=rank, WORLD_SIZE=8) for rank in range(8)],
        [first(SLURM_ARRAY_TASK_ID=n // 2, SLURM_PROCID=n % 2, SLURM_NTASKS=2) for n in range(8)],
    ):
        gaps = [b - a for a, b in zip(sorted(starts), [*sorted(starts)[1:], min(starts) + 1000], strict=True)]
        assert min(gaps) >= 50 and all(0 <= start < 1000 for start in starts)
    assert start_position(3, {}) in (0, 1, 2)
