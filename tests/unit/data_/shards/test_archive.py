"""Archives are read by their headers: whole ones fully, damaged ones up to the damage, hostile names never."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.shards.archive import refusal, scan_tar, split_name
from data.shards.folder import write_tar

SAMPLES = [{"__key__": f"clip-{i}", "mp4": bytes([i]) * (1 + 700 * i), "txt": f"caption é {i}"} for i in range(3)]


def archive(path, members):
    """A tar of (TarInfo or name, content)."""
    with tarfile.open(path, "w") as tar:
        for info, content in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def whole(path):
    """Samples by tarfile itself, read to the end."""
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]


def test_members_hold_the_bytes_that_tarfile_reads(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, SAMPLES)
    scan = scan_tar(path)
    raw = path.read_bytes()
    seen = [
        (f"{key}.{e}", raw[m.offset : m.offset + m.size]) for key, members in scan.samples for e, m in members.items()
    ]
    assert seen == whole(path) and scan.damage is None and scan.refused == []


@given(cut=st.integers(min_value=0, max_value=10_239))
def test_a_cut_archive_gives_whole_members_before_the_cut_and_says_so(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    path, cut_path = folder / "a.tar", folder / "cut.tar"
    write_tar(path, SAMPLES)
    full = scan_tar(path)
    raw = path.read_bytes()
    cut_path.write_bytes(raw[:cut])
    scan = scan_tar(cut_path)
    places = {(key, e): m for key, members in full.samples for e, m in members.items()}
    ends = max(m.offset + m.size for m in places.values())
    for key, members in scan.samples:
        for extension, member in members.items():
            assert member == places[key, extension] and member.offset + member.size <= cut
    # Blocks of zeros fill an archive up: without some of them it is still whole.
    if cut < ends + 512:
        assert scan.damage


@pytest.mark.parametrize("at", [0, 100, 148, 1024, 2048 + 156])
def test_a_damaged_header_is_named(tmp_path, at):
    path = tmp_path / "a.tar"
    write_tar(path, SAMPLES)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0xFF
    path.write_bytes(raw)
    scan = scan_tar(path)
    assert scan.damage and len(scan.samples) < 3


@pytest.mark.parametrize("content", [b"", b"not an archive" * 100, bytes(100)])
def test_what_is_no_archive_is_named(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    assert scan_tar(path).damage and not scan_tar(path).samples


@pytest.mark.parametrize(
    "name, why",
    [
        ("/etc/passwd", "absolute"),
        ("C:\\windows", "absolute"),
        ("../../up.mp4", "leads out"),
        ("a/../../up.mp4", "leads out"),
        ("a\\..\\up.mp4", "leads out"),
        ("clip.pyd", "can hold code"),
        ("clip.PKL", "can hold code"),
        ("clip.frames.pt", "can hold code"),
        ("clip.pickle", "can hold code"),
    ],
)
def test_hostile_names_are_refused(tmp_path, name, why):
    path = archive(tmp_path / "a.tar", [("good.mp4", b"x"), (name, b"y"), ("good.txt", b"z")])
    scan = scan_tar(path)
    assert [(key, sorted(members)) for key, members in scan.samples] == [("good", ["mp4", "txt"])]
    assert len(scan.refused) == 1 and why in scan.refused[0][1]
    assert scan.damage is None


@pytest.mark.parametrize("name", ["clip.mp4", "a/b/clip.txt", "..clip.mp4", "clip..mp4", "clip.part.json", "./x.mp4"])
def test_plain_names_are_not_refused(name):
    assert refusal(name) is None


def test_links_and_devices_are_refused(tmp_path):
    link, device = tarfile.TarInfo("clip.mp4"), tarfile.TarInfo("clip.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type = tarfile.CHRTYPE
    scan = scan_tar(archive(tmp_path / "a.tar", [(link, b""), (device, b""), ("b.mp4", b"x")]))
    assert [key for key, _ in scan.samples] == ["b"] and len(scan.refused) == 2


def test_a_second_member_of_one_name_does_not_replace_the_first(tmp_path):
    scan = scan_tar(archive(tmp_path / "a.tar", [("a.txt", b"first"), ("a.txt", b"second")]))
    ((_, members),) = scan.samples
    assert members["txt"].offset == 512 and scan.refused[0][0] == "a.txt"


def test_long_names_of_pax_and_gnu_archives(tmp_path):
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        name = "folder/" * 30 + "clip é.mp4"
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        ((key, members),) = scan_tar(path).samples
        assert key == name.removesuffix(".mp4")
        assert path.read_bytes()[members["mp4"].offset :][:3] == b"abc"


@pytest.mark.parametrize(
    "name, split",
    [
        ("a.mp4", ("a", "mp4")),
        ("f.x/a.MP4", ("f.x/a", "mp4")),
        ("a.b.json", ("a", "b.json")),
        ("./a.txt", ("a", "txt")),
    ],
)
def test_names_split_at_the_first_dot_of_the_last_part(name, split):
    assert split_name(name) == split
