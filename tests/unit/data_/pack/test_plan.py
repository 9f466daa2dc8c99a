"""The plan of the shards: which sample goes where."""

from hypothesis import given
from hypothesis import strategies as st

from data.bucket import Bucket
from data.pack.plan import make_plan, split_into_shards
from tests.support.packing import SMALL

rows = st.lists(
    st.tuples(
        st.text("ab-w01", min_size=1, max_size=4),
        st.integers(0, 3000),  # bytes of the clip
        st.integers(0, 6),  # content
        st.lists(st.sampled_from([*SMALL, "13x32x32"]), max_size=3),
    ),
    max_size=40,
)


@given(rows=rows, shard_bytes=st.integers(1, 20_000), shard_samples=st.integers(1, 7), drop=st.booleans())
def test_a_plan_holds_every_sample_in_order_within_its_bounds(rows, shard_bytes, shard_samples, drop):
    journal = []
    for number, (key, size, content, windows) in enumerate(rows):
        facts = {"frames": 7}
        row = {"key": key, "bytes": size, "facts": facts, "caption": "é", "sha256": f"{content:064x}",
               "windows": [[name, list(range(7))] for name in windows]}  # fmt: skip
        journal.append((number // 256, number, row if windows else {"key": key, "fault": "broken"}))
    buckets = [Bucket.parse(name) for name in (*SMALL, "13x32x32")]
    plan = make_plan(
        journal, buckets, shard_bytes=shard_bytes, shard_samples=shard_samples, drop_duplicates=drop
    )  # fmt: skip
    usable = [(number, row) for _, number, row in journal if "windows" in row]
    planned = {bucket: [s for b, part in plan.shards.values() if b == bucket for s in part] for bucket in buckets}
    seen = [(s.offset, s.window) for part in planned.values() for s in part]
    assert len(seen) == len(set(seen)) == plan.samples
    for bucket, part in planned.items():
        assert [s.key for s in part] == sorted(s.key for s in part)
        for sample in part:
            assert rows[sample.offset][3][sample.window] == bucket.name
    for name, (bucket, part) in plan.shards.items():
        assert name.startswith(f"{bucket.name}-") and 1 <= len(part) <= shard_samples
        assert len(part) == 1 or sum(s.bytes for s in part) <= shard_bytes
    numbers = {bucket: [name for name, (b, _) in plan.shards.items() if b == bucket] for bucket in buckets}
    for bucket, names in numbers.items():
        assert names == [f"{bucket.name}-{i:06d}.tar" for i in range(len(names))]
    # Samples that are not planned are reported: repeated keys, and repeated content if it is to be dropped.
    keys = [s.key for part in planned.values() for s in part]
    assert len(keys) == len(set(keys))
    left_out = [d for d in plan.duplicates if d.kind == "key" or drop]
    if not left_out:
        assert len(seen) == sum(len(row["windows"]) for _, row in usable)
    first_of = {}
    for number, row in usable:
        first_of.setdefault(row["key"], number)
    if not drop:
        clash = {d.key for d in plan.duplicates if d.kind == "key"}
        for key, number in first_of.items():
            want = {(number, w) for w in range(len(rows[number][3])) if f"{key}--w{w:03d}" not in clash}
            assert want <= set(seen)


def test_a_clip_may_have_the_key_of_another_clips_window():
    rows = [
        (0, number, {"key": key, "bytes": 9, "facts": {"frames": 7}, "caption": "", "sha256": f"{number:064x}",
                     "windows": [["7x32x32", list(range(7))]] * count})
        for number, (key, count) in enumerate([("a", 2), ("a--w001", 1)])
    ]  # fmt: skip
    plan = make_plan(rows, [Bucket(7, 32, 32)], shard_bytes=10**6, shard_samples=9)
    [(_, planned)] = plan.shards.values()
    assert [(s.key, s.offset, s.window) for s in planned] == [("a--w000", 0, 0), ("a--w001", 1, 0)]
    assert plan.duplicates == [("a--w001", "a--w001", "key", (0, 0), (0, 1))]


@given(sizes=st.lists(st.integers(0, 100)), limit=st.integers(1, 300), count=st.integers(1, 9))
def test_samples_are_split_into_shards_of_bounded_size(sizes, limit, count):
    parts = list(split_into_shards(sizes, limit, count))
    assert [i for part in parts for i in part] == list(range(len(sizes)))
    for part, following in zip(parts, [*parts[1:], None], strict=False):
        total = sum(sizes[i] for i in part)
        assert len(part) <= count and (total <= limit or len(part) == 1)
        if following is not None:  # no shard is smaller than it has to be
            assert len(part) == count or total + sizes[following.start] > limit
