"""The page holds the figures of the run's files, and says what the files lack."""

import base64
import re
from pathlib import Path

import numpy as np
import pytest

from launch.report.command import report, running_mean
from tests.support.pages import PageText
from tests.support.reported_run import PROMPTS, SIGMAS, write_masking


def test_the_page_says_so(run: Path, capsys: pytest.CaptureFixture):
    path = report(run)
    assert path == run / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {path.resolve()}"
    page = PageText(path.read_text())
    assert page.open == []
    for part in (
        "2 / 2 planted sinks found before", "0 / 2 of them still sinks", "0.12 → 0.72",
        "planted on purpose, 2 of them (layer 4 head 1, layer 5 head 0)", "Its note: Planted <by hand>.",
        "Before: 2 of 2 planted heads found", "frequency 1.0 at ε = 0.3", "No other head is flagged.",
        "With a sink in some prompts only: layer 5 head 2 (mean frequency 0.25)",
        "After epoch 2: no planted head is a sink; their highest frequency at any noise level is 0.50",
        "0.123 before, 0.654 after, higher by 0.531 [", "Dense loss on the same probes: 0.45 before, 0.41 after",
        "Validation loss of the retrained model: 0.41. A fit does not validate its base",
        "stayed bit-identical", "2 steps were skipped", "reblock fit --config r.yaml", "torch 2.13.0", "ab" * 32,
        "a red <circle>", "retrained, masked", "PSNR 23.4 dB, SSIM 0.876 to the dense video", "50 % of the weights",
        "layer-04 r* at 1 % of the own loss 0.77 [0.687, 0.857] 0.77 [0.687, 0.857] no difference that can be told",
        "layer-04 r* at 1 % of the base's loss 0.77 [0.728, 0.814] 0.845 [0.799, 0.893] higher by 0.0751 [0.07",
        "none dense loss L 0.45 [0.424, 0.474] 0.41 [0.387, 0.432] lower by 0.04 [−0.0421, −0.0377]",
        "layer-04 robustness AUC −1.15 [−1.15, −1.15] −1.15 [−1.15, −1.15] no difference that can be told from noise",
        "layer-04 uniform control ΔL / L 1.33 [1.33, 1.33] 1.46 [1.46, 1.46] higher by 0.13 [0.13, 0.13]",
        "layer 4, head 1 7.5 1 1 [0.9, 1] 0.5 [0.45, 1] 0.125 0.125 0.25 0.25 lower by 0.5 [−0.785, −0.0683]",
        "after against before: lower: layer 4 head 1, layer 5 head 0.",
        f"{PROMPTS} prompts, {SIGMAS} noise levels, 70 queries and 71 keys", "class_path: x.Y",
    ):  # fmt: skip
        assert part in page.text, part


def test_the_report_links_to_the_controls_where_they_were_compared(run: Path):
    assert "No control stands beside this run here" in PageText(report(run).read_text()).text
    (run / "compare.html").write_text("")
    page = report(run).read_text()
    assert '<a href="compare.html">' in page and "No control" not in page


@pytest.fixture
def drawn(run: Path, monkeypatch: pytest.MonkeyPatch):
    """y label -> curves of the charts that `report` draws, when it is called."""
    found: dict = {}

    def line_chart(series, y_label, **_):
        found[y_label] = series
        return "drawn"

    def panel_chart(panels, **_):
        found.update({panel.y_label: panel.series for panel in panels})
        return "drawn"

    for module in ("command", "masking_page"):
        monkeypatch.setattr(f"launch.report.{module}.line_chart", line_chart)
    monkeypatch.setattr("launch.report.masking_page.panel_chart", panel_chart)
    return found


def test_masking_is_drawn_before_and_after(run: Path, drawn: dict):
    report(run)
    ratios = np.linspace(0.1, 0.9, 9)
    for y_label, curve in (
        ("relative squared change", [ratios**2] * 2),
        ("loss increase", [0.01 * ratios / 0.123, 0.01 * ratios / 0.654]),
    ):
        before, uniform, after, _ = drawn[y_label]
        assert (before.label, after.label) == ("before (base)", "after (epoch 2)")
        np.testing.assert_allclose([before.y, after.y], curve)
        assert uniform.style == "dashed"
    assert drawn["loss increase"][1].y[0] == pytest.approx(0.5 / 0.45)
    before, after = drawn["loss increase by mass"]
    np.testing.assert_allclose([before.x, after.x], [ratios**2 / 50] * 2)
    np.testing.assert_allclose(after.y, drawn["loss increase"][2].y)
    assert [(s.label, s.y) for s in drawn["sink heads"]][1] == ("base", [2, 2])


def test_the_critical_ratio_is_drawn_with_what_it_depends_on(run: Path, drawn: dict):
    report(run)
    own, of_base = drawn["critical ratio r*"]
    np.testing.assert_allclose(own.y, [0.123, 0.9, 0.654])  # the base, epoch 0, epoch 2
    np.testing.assert_allclose(of_base.y, [0.123, 0.9 * 0.45 / 0.99, 0.654 * 0.45 / 0.41])
    low, high = np.array(own.ends)
    assert (low <= own.y).all() and (own.y <= high).all() and low[0] < 0.123 < high[0]
    (loss,) = drawn["dense loss L"]
    np.testing.assert_allclose(loss.y, [0.45, 0.99, 0.41])
    assert (np.array(loss.ends)[0] < loss.y).all() and (loss.y < np.array(loss.ends)[1]).all()
    controls = drawn["uniform ΔL / L"]
    np.testing.assert_allclose([c.y for c in controls], [[0.5 / 0.45, 0.5 / 0.99, 0.5 / 0.41], [0.5 / 0.45] * 3])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [({}, "Whether sinks prefer a position was not measured."),
     ({"frame_p": np.nan, "place_p": np.nan}, "No sink, so no position to test."),
     ({"frame_p": 0.0005, "place_p": 0.3}, "p = 0.0005 over latent frames and p = 0.3 over places in the frame")],
)  # fmt: skip
def test_positions_of_sinks_are_told(run: Path, arrays: dict, said: str):
    path = run / "measurements" / "sinks-epoch-002.npz"
    np.savez(path, **{**np.load(path), **arrays})
    assert said in PageText(report(run).read_text()).text


def test_only_changes_that_can_be_told_are_coloured(run: Path):
    cells = dict(re.findall(r"<td>([^<]*)</td>(?:<td>[^<]*</td>){2}<td class=\"(\w*)\">", report(run).read_text()))
    assert cells["dense loss L"] == "good" and cells["uniform control ΔL / L"] == "" == cells["robustness AUC"]
    write_masking(run, "epoch-002", 0.05, 0.48)
    page = report(run).read_text()
    assert re.search(
        r'retrained</td><td>r\* at 1 % of the own loss</td>(<td>[^<]*</td>){2}<td class="bad">lower by', page
    )
    assert re.search(r'dense loss L</td>(<td>[^<]*</td>){2}<td class="bad">higher by', page)


def test_it_is_one_picture(run: Path):
    pictures = re.findall(r"<svg.*?</svg>", report(run).read_text())
    (picture,) = [svg for svg in pictures if "critical ratio r*" in svg]
    assert "dense loss L" in picture and "uniform ΔL / L" in picture and 'class="bar"' in picture


@pytest.mark.parametrize(("uniform", "blank"), [(0.0042, "own base"), (0.0047, "own"), (0.0099, "")])
def test_a_critical_ratio_is_blank_where_attention_costs_nothing(run: Path, drawn: dict, uniform: float, blank: str):
    write_masking(run, "epoch-002", 0.654, 0.48, uniform=uniform)  # 1 %: of the own loss 0.0048, of the base's 0.0045
    text = PageText(report(run).read_text()).text
    reason = "not measured: the uniform control costs nothing"
    for kind, words, curve in zip(
        ("own", "base"), ("own loss", "base's loss"), drawn["critical ratio r*"], strict=True
    ):
        assert np.isnan(curve.y[2]) == (kind in blank)
        assert (f"r* at 1 % of the {words}, epoch 2: {reason}." in text) == (kind in blank)
    assert (f"retrained r* at 1 % of the own loss 0.123 [0.11, 0.137] {reason}" in text) == ("own" in blank)


def test_a_run_without_figures_of_every_probe_is_shown_without_intervals(run: Path):
    for stage in ("base", "epoch-000", "epoch-002"):
        write_masking(run, stage, 0.3, 0.4, per_probe=False)
        path = run / "measurements" / f"masking-{stage}.npz"
        np.savez(path, **{name: value for name, value in np.load(path).items() if name != "dropped_mass"})
    page = report(run).read_text()
    assert "Not measured: the run kept no dropped mass." in page and "0.3 → 0.3" in PageText(page).text
    assert 'class="bar"' not in page


def test_the_largest_ratio_measured_is_a_lower_bound(run: Path):
    write_masking(run, "epoch-002", 0.9, 0.45)
    text = PageText(report(run).read_text()).text
    assert "retrained r* at 1 % of the own loss 0.123 [0.11, 0.137] ≥ 0.9 [0." in text


def test_a_robustness_auc_is_told_without_a_colour(run: Path):
    path = run / "measurements" / "masking-epoch-002.npz"
    arrays = dict(np.load(path))
    arrays["auc"] = arrays["auc"] - 1
    np.savez(path, **arrays | {"change_by_probe": arrays["change_by_probe"] / 10})
    page = report(run).read_text()
    assert re.search(r'retrained</td><td>robustness AUC(</td><td>[^<]*){2}</td><td class="">lower by 1 ', page)


def test_without_the_base_there_is_no_tolerance_of_its_own(run: Path):
    (run / "measurements" / "masking-base.npz").unlink()
    text = PageText(report(run).read_text()).text
    assert "r* at 1 % of the base's loss, epoch 0, epoch 2: not measured: the stage base was not." in text


def test_the_page_holds_everything_itself(run: Path):
    page = PageText(report(run).read_text())
    videos = [address for address in page.addresses if address.startswith("data:video/mp4;base64,")]
    assert len(videos) == 3
    assert [base64.b64decode(v.split(",")[1]) for v in videos] == [
        (run / "samples" / f"{name}.mp4").read_bytes() for name in ("base", "retrained", "retrained-masked")
    ]
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script", report(run).read_text())


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
    assert said in PageText(report(run).read_text()).text


def test_figures_without_a_number_do_not_break_the_page(run: Path):
    write_masking(run, "epoch-002", float("nan"), float("nan"))
    (run / "metrics.csv").write_text("step,train/loss,val/loss\n1,nan,inf\n2,,nan\n")
    text = PageText(report(run).read_text()).text
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


def test_the_running_mean_leaves_out_what_is_no_number():
    mean = running_mean([1.0, np.nan, *[3.0] * 98])  # windows of two
    assert mean[:4] == [1.0, 1.0, 3.0, 3.0]
