"""The report: its figures are those of the files, and what the files lack is said to be lacking."""

import base64
import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data.video.write import write_video
from launch.report.charts import Series, heat_map, line_chart, number
from launch.report.command import report, running_mean
from launch.report.findings import read_findings
from launch.report.sentences import sentences, tiles

LAYERS, HEADS, SIGMAS, PROMPTS = (4, 5), 3, 2, 4
EPS = (0.1, 0.3)
PLANTED = ((4, 1), (5, 0))


def _sinks(run: Path, stage: str, frequency: dict[tuple[int, int], float]) -> None:
    """Frequencies at eps 0.3; at eps 0.1 every head is a sink, so that a mix-up of the axis shows."""
    shape = (SIGMAS, len(LAYERS), HEADS)
    at = np.zeros(shape)
    for (layer, head), value in frequency.items():
        at[:, LAYERS.index(layer), head] = value
    per_head = np.full((PROMPTS, *shape), 0.125)
    np.savez_compressed(
        run / "measurements" / f"sinks-{stage}.npz",
        layers=np.array(LAYERS), sigmas=np.array([0.3, 0.7]), eps=np.array(EPS), default_eps=np.array(0.3),
        keys=np.array([f"clip-{i}" for i in range(PROMPTS)]), frequency=np.stack([np.ones(shape), at], axis=-1),
        consistent=(at >= 0.9).all(axis=0), alpha=per_head, value_norm_ratio=per_head * 2,
        queries=np.array(70), keys_count=np.array(71),
    )  # fmt: skip


def _masking(run: Path, stage: str, critical: float, dense: float) -> None:
    ratios = np.linspace(0.1, 0.9, 9)
    curve = np.stack([ratios**2, ratios**3])
    np.savez_compressed(
        run / "measurements" / f"masking-{stage}.npz",
        ratios=ratios, sigmas=np.array([0.3, 0.7]), scopes=np.array(["retrained", "layer-04"]), distortion=curve,
        loss_increase=curve * 0.1, dense_loss=np.array(dense), auc=np.array([-1.5, -2.5]),
        critical_ratio=np.array([critical, 0.77]), uniform_distortion=np.array([0.9, np.nan]),
        uniform_loss_increase=np.array([0.5, 0.6]), prompts=np.array(PROMPTS), samples=np.array(PROMPTS * SIGMAS),
    )  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    heads = [{"layer": layer, "head": head, "gain": 7.5, "verified_frequency": 1.0} for layer, head in PLANTED]
    content = {"heads": heads, "val_loss_before": 0.4, "val_loss_after": 0.4321, "note": "Planted <by hand>."}
    (folder / "planted.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    run = tmp_path / "runs" / "trial"
    (run / "measurements").mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"model:\n  class_path: x.Y\n  init_args:\n    base: {base}\nrun: {{name: trial}}\n"
    )
    _sinks(run, "base", {(4, 1): 1.0, (5, 0): 1.0, (5, 2): 0.25})
    _sinks(run, "epoch-000", {})
    _sinks(run, "epoch-001", {(5, 0): 0.95})
    _sinks(run, "epoch-002", {(4, 1): 0.5})
    for stage, critical, dense in (("base", 0.123, 0.45), ("epoch-000", 0.9, 0.99), ("epoch-002", 0.654, 0.41)):
        _masking(run, stage, critical, dense)
    rows: list[dict] = [
        {"step": step, "train/loss": 1 / step, "train/loss_sigma_0.00-0.25": "nan" if step == 3 else 2 / step}
        for step in range(1, 9)
    ]
    rows[3]["val/loss"], rows[7]["val/loss"], rows[7]["train/skipped"] = 0.6, 0.41, 2.0
    with (run / "metrics.csv").open("w", newline="") as file:
        names = ["step", "train/loss", "train/loss_sigma_0.00-0.25", "val/loss", "train/skipped"]
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
    (run / "fingerprint.json").write_text(json.dumps({"before": "ab" * 32, "after": "ab" * 32, "equal": True}))
    versions = {"python": "3.11.9", "packages": {"torch": "2.13.0"}, "git": "f00", "hardware": {"cores": 2}}
    (run / "versions.json").write_text(json.dumps(versions | {"command": "reblock fit --config r.yaml"}))
    _samples(run)
    return run


def _samples(run: Path) -> None:
    (run / "samples").mkdir()
    entries = []
    for variant, psnr in (("base", None), ("retrained", None), ("retrained-masked", 23.45)):
        write_video(run / "samples" / f"{variant}.mp4", np.zeros((3, 16, 64, 3), np.uint8), 12)
        entries.append(
            {"caption": "a red <circle>", "seed": 3, "variant": variant, "file": f"{variant}.mp4", "frames": 3,
             "fps": 12, "psnr_to_dense": psnr, "ssim_to_dense": psnr and 0.876,
             "settings": {"mask_ratio": 0.5 if psnr else 0.0}}
        )  # fmt: skip
    (run / "samples" / "samples.json").write_text(json.dumps([*entries, {**entries[0], "file": "gone.mp4"}]))


class _Text(HTMLParser):
    """Visible text, addresses, and whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "img", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "br", "img", "line", "rect", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_the_findings_are_those_of_the_files(run: Path):
    found = read_findings(run)
    assert found.planted_heads == list(PLANTED)
    assert found.found_before == 2
    assert found.others_before == []
    assert found.after.stage == "epoch-002"
    assert found.planted_after == []
    assert found.masking_before.value("critical_ratio") == 0.123
    assert found.masking_after.value("critical_ratio") == 0.654
    assert found.val_loss == 0.41
    assert found.loss_difference == pytest.approx(0.025)
    assert found.frozen_equal is True


def test_the_page_says_so(run: Path, capsys: pytest.CaptureFixture):
    path = report(run)
    assert path == run / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {path.resolve()}"
    page = _Text(path.read_text())
    assert page.open == []
    for part in (
        "2 / 2 planted sinks found before", "0 / 2 of them still sinks", "0.12 → 0.65", "+2.5 %",
        "planted on purpose, 2 of them (layer 4 head 1, layer 5 head 0)", "Its note: Planted <by hand>.",
        "Before: 2 of 2 planted heads found", "frequency 1.0 at ε = 0.3", "No other head is flagged.",
        "With a sink in some prompts only: layer 5 head 2 (mean frequency 0.25)",
        "After epoch 2: no planted head is a sink; their highest frequency at any noise level is 0.50",
        "0.123 before, 0.654 after epoch 2", "Dense loss on the same probes: 0.45 before, 0.41 after",
        "0.4 for the base before planting, 0.4321 with the sinks planted, 0.41 retrained",
        "stayed bit-identical", "2 steps were skipped", "reblock fit --config r.yaml", "torch 2.13.0", "ab" * 32,
        "a red <circle>", "retrained, masked", "PSNR 23.4 dB, SSIM 0.876 to the dense video", "50 % of the weights",
        "layer-04 0.77 0.77 −2.5 −2.5 1.33 1.46", "layer 4, head 1 7.5 1 1 0.5 0.125 0.125 0.25 0.25",
        f"{PROMPTS} prompts, {SIGMAS} noise levels, 70 queries and 71 keys", "class_path: x.Y",
    ):  # fmt: skip
        assert part in page.text, part


def test_masking_is_drawn_before_and_after(run: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = {}
    monkeypatch.setattr(
        "launch.report.command.line_chart", lambda series, y_label, **_: drawn.setdefault(y_label, series) and ""
    )
    report(run)
    ratios = np.linspace(0.1, 0.9, 9)
    for y_label, curve in (
        ("relative squared change", [ratios**2] * 2),
        ("loss increase", [ratios**2 / 4.5, ratios**2 / 4.1]),
    ):
        before, uniform, after, _ = drawn[y_label]
        assert (before.label, after.label) == ("before (base)", "after (epoch 2)")
        np.testing.assert_allclose([before.y, after.y], curve)
        assert uniform.style == "dashed"
    assert drawn["loss increase"][1].y[0] == pytest.approx(0.5 / 0.45)
    assert [(s.label, s.y) for s in drawn["sink heads"]][1] == ("base", [2, 2])


def test_the_page_holds_everything_itself(run: Path):
    page = _Text(report(run).read_text())
    videos = [address for address in page.addresses if address.startswith("data:video/mp4;base64,")]
    assert len(videos) == 3
    assert [base64.b64decode(v.split(",")[1]) for v in videos] == [
        (run / "samples" / f"{name}.mp4").read_bytes() for name in ("base", "retrained", "retrained-masked")
    ]
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script", report(run).read_text())


def test_bad_news_is_told(run: Path):
    _sinks(run, "base", {(4, 1): 1.0, (5, 0): 0.9, (5, 2): 1.0})
    _sinks(run, "epoch-010", {(4, 1): 1.0, (4, 0): 0.92})
    (run / "fingerprint.json").write_text(json.dumps({"before": "a", "after": "b", "equal": False}))
    found = read_findings(run)
    assert found.found_before == 1
    assert found.others_before == [(5, 2)]
    assert found.after.stage == "epoch-010"
    assert found.planted_after == [(4, 1)]
    assert found.others_after == [(4, 0)]
    said = " ".join(sentences(found))
    assert "1 of 2 planted heads found" in said
    assert "Flagged too, though not planted: layer 5 head 2 (mean frequency 1.00)" in said
    assert "still sinks: layer 4 head 1; their highest frequency at any noise level is 1.00" in said
    assert "CHANGED during training" in said
    assert [tile.mood for tile in tiles(found)[:2]] == ["bad", "bad"]


def test_many_passing_sinks_are_summed_up(run: Path):
    _sinks(run, "epoch-002", dict.fromkeys([(layer, head) for layer in LAYERS for head in range(HEADS)], 0.25))
    wide = {
        "frequency": np.full((SIGMAS, len(LAYERS), 9, len(EPS)), 0.25),
        "consistent": np.zeros((len(LAYERS), 9), bool),
    }
    path = run / "measurements" / "sinks-epoch-002.npz"
    np.savez(path, **{**np.load(path), **wide})
    assert "16 heads have a sink in some prompts only (mean frequency at most 0.25)" in " ".join(
        sentences(read_findings(run))
    )


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        ("samples", "No samples were drawn."),
        ("measurements", "No sinks were measured."),
        ("measurements", "Masking robustness of the retrained blocks was not measured."),
        ("metrics.csv", "metrics.csv holds no loss."),
        ("metrics.csv", "No validation loss was logged."),
        ("fingerprint.json", "No fingerprint of the frozen weights was taken."),
        ("versions.json", "No versions were recorded."),
        ("versions.json", "the command of the fit was not recorded"),
        ("config.yaml", "The run holds no config.yaml."),
        ("config.yaml", "the base has no planted.json"),
    ],
)
def test_what_is_missing_is_said(run: Path, remove: str, said: str):
    path = run / remove
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
    else:
        path.unlink()
    assert said in _Text(report(run).read_text()).text


def test_an_untrained_run_has_no_after(run: Path):
    for path in (run / "measurements").glob("*-epoch-00[12].npz"):
        path.unlink()
    found = read_findings(run)
    assert found.after is None
    assert "Sinks after training were not measured." in sentences(found)
    assert "0.9" not in " ".join(tile.value for tile in tiles(found))  # epoch-000 is no result


def test_figures_without_a_number_do_not_break_the_page(run: Path):
    _masking(run, "epoch-002", float("nan"), float("nan"))
    (run / "metrics.csv").write_text("step,train/loss,val/loss\n1,nan,inf\n2,,nan\n")
    text = _Text(report(run).read_text()).text
    assert "0.12 → n/a" in text
    assert "The last validation loss is not a finite number." in text
    assert not re.search(r"\bnan\b", text)
    assert "No finite value to draw." in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="expected a folder that `reblock fit` wrote"):
        report(tmp_path)


def test_the_page_can_go_elsewhere(run: Path, tmp_path: Path):
    assert report(run, out=tmp_path / "new" / "page.html").is_file()
    assert not (run / "report.html").exists()


# -- charts ----------------------------------------------------------------------------------------------------------


def _points(svg: str) -> list[tuple[float, float]]:
    found = re.findall(r'points="([^"]*)"', svg)
    return [tuple(map(float, pair.split(","))) for line in found for pair in line.split()]


def test_a_chart_is_to_scale():
    svg = line_chart([Series("a", [0, 1, 2], [0.0, 5.0, 10.0], 1)], x_label="x", y_label="y")
    (x0, y0), (x1, y1), (x2, y2) = _points(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y2
    grid = {text: float(at) for at, text in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]*)<', svg)}
    assert grid["0"] - 4 == pytest.approx(y0, abs=0.11)
    assert grid["10"] - 4 == pytest.approx(y2, abs=0.11)


def test_a_curve_is_broken_where_there_is_no_number():
    svg = line_chart([Series("a", range(5), [1, 2, np.nan, 4, 5], 1)], x_label="x", y_label="y")
    assert svg.count("<polyline") == 2
    assert "nan" not in svg


def test_a_logarithmic_chart_leaves_out_zero():
    svg = line_chart([Series("a", range(4), [0.0, 0.1, 1.0, 10.0], 1)], x_label="x", y_label="y", scale="log")
    heights = [y for _, y in _points(svg)]
    assert len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: line_chart([Series("a", [1], [1.0], 1)], x_label="x", y_label="y"),
        lambda: line_chart([Series("a", [1, 2], [3.0, 3.0], 1)], x_label="x", y_label="y", scale="percent"),
        lambda: line_chart([Series("a", [1, 2], [0.0, 0.0], 1)], x_label="x", y_label="y", rule=(0.0, "r")),
        lambda: heat_map(np.full((1, 24), np.nan), ["layer 1"]),
    ],
)
def test_degenerate_charts_are_drawn(draw: Callable[[], str]):
    assert not re.search("nan|inf", draw())


def test_a_heat_map_names_its_cells_and_rings():
    svg = heat_map(np.array([[0.0, 0.25], [1.0, np.nan]]), ["layer 4", "layer 5"], marked={(1, 0)})
    assert "<title>layer 4, head 1: 0.25</title>" in svg
    assert svg.count('class="ring"') == 1
    assert re.search(r'class="ring"><title>layer 5, head 0: 1<', svg)
    assert "layer 5, head 1: n/a" in svg


def test_numbers_and_running_means():
    assert [number(v) for v in (0.0, 0.12345, -2.0, float("nan"), float("inf"))] == ["0", "0.123", "−2", "n/a", "n/a"]
    mean = running_mean([1.0, np.nan, *[3.0] * 98])  # windows of two
    assert mean[:4] == [1.0, 1.0, 3.0, 3.0]
