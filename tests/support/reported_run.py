"""A run folder with made-up results, written by hand: what `reblock report` reads."""

import csv
import json
from pathlib import Path

import numpy as np

from data.video.write import write_video

LAYERS, HEADS, SIGMAS, PROMPTS = (4, 5), 3, 2, 8
EPS = (0.1, 0.3)
PLANTED = ((4, 1), (5, 0))


def write_sinks(run: Path, stage: str, frequency: dict[tuple[int, int], float], *, captions: bool = True) -> None:
    """Frequencies at eps 0.3; at eps 0.1 every head is a sink, so that a mix-up of the axis shows.

    Args:
        run: folder.
        stage: of the file.
        frequency: (layer, head) -> share of the prompts, the first ones, at both sigmas.
        captions: keep the number of each sample's caption; older runs did not.
    """
    shape = (SIGMAS, len(LAYERS), HEADS)
    at = np.zeros(shape)
    for (layer, head), value in frequency.items():
        at[:, LAYERS.index(layer), head] = value
    per_head = np.full((PROMPTS, *shape), 0.125)
    with_sink = np.arange(PROMPTS)[:, None, None, None] + 0.5 < at * PROMPTS
    kept = {"caption_ids": np.arange(PROMPTS)} if captions else {}
    np.savez_compressed(
        run / "measurements" / f"sinks-{stage}.npz",
        layers=np.array(LAYERS), sigmas=np.array([0.3, 0.7]), eps=np.array(EPS), default_eps=np.array(0.3),
        keys=np.array([f"clip-{i}" for i in range(PROMPTS)]), frequency=np.stack([np.ones(shape), at], axis=-1),
        consistent=(at >= 0.9).all(axis=0), alpha=per_head, value_norm_ratio=per_head * 2,
        queries=np.array(70), keys_count=np.array(71), **kept,
        fraction=np.stack([np.ones_like(per_head), np.where(with_sink, 0.9, 0.1)], axis=-1),
        frequency_low=np.stack([np.ones(shape), at * 0.9], axis=-1), frequency_high=np.ones((*shape, 2)),
    )  # fmt: skip


def write_masking(
    run: Path, stage: str, critical: float, dense: float, *, uniform: float = 0.5, per_probe: bool = True
) -> None:
    """A loss that grows linearly with the ratio, so that the critical ratio is the one asked for.

    Args:
        run: folder.
        stage: of the file.
        critical: ratio of the retrained scope.
        dense: loss.
        uniform: the control's increase of the loss in the retrained scope.
        per_probe: keep the figures of every probe, from 0.9 to 1.1 times the mean; older runs did not.
    """
    ratios = np.linspace(0.1, 0.9, 9)
    change, control = np.stack([ratios**2, ratios**3]), np.array([uniform, 0.6])
    increase = 0.01 * dense * ratios / np.array([[critical], [0.77]])
    arrays = {
        "ratios": ratios, "sigmas": np.array([0.3, 0.7]), "scopes": np.array(["retrained", "layer-04"]),
        "distortion": change, "loss_increase": increase, "dense_loss": np.array(dense),
        "auc": np.log10(change).mean(axis=1),
        "critical_ratio": np.array([critical, 0.77]), "uniform_distortion": np.array([0.9, np.nan]),
        "uniform_loss_increase": control, "dropped_mass": change / 50,
        "prompts": np.array(PROMPTS), "samples": np.array(PROMPTS * SIGMAS),
    }  # fmt: skip
    if per_probe:
        scale = np.linspace(0.9, 1.1, PROMPTS)[:, None] * np.ones(SIGMAS)
        loss = dense * scale
        arrays |= {
            "dense_loss_by_probe": loss, "energy_by_probe": scale, "change_by_probe": scale[..., None, None] * change,
            "loss_by_probe": loss[..., None, None] + scale[::-1, :, None, None] * increase,
            "uniform_loss_by_probe": loss[..., None] + scale[..., None] * control,
            "keys": np.array([f"clip-{i}" for i in range(PROMPTS)]), "caption_ids": np.arange(PROMPTS),
        }  # fmt: skip
    np.savez_compressed(run / "measurements" / f"masking-{stage}.npz", **arrays)


def write_planted_base(folder: Path) -> Path:
    """A base folder that names two planted heads."""
    folder.mkdir()
    heads = [{"layer": layer, "head": head, "gain": 7.5, "verified_frequency": 1.0} for layer, head in PLANTED]
    content = {"heads": heads, "val_loss_before": 0.4, "val_loss_after": 0.4321, "note": "Planted <by hand>."}
    (folder / "planted.json").write_text(json.dumps(content))
    return folder


def write_run(run: Path, base: Path) -> Path:
    """A run with every file that a fit and `reblock sample` leave."""
    (run / "measurements").mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"model:\n  class_path: x.Y\n  init_args:\n    base: {base}\nrun: {{name: trial}}\n"
    )
    write_sinks(run, "base", {(4, 1): 1.0, (5, 0): 1.0, (5, 2): 0.25})
    write_sinks(run, "epoch-000", {})
    write_sinks(run, "epoch-001", {(5, 0): 0.95})
    write_sinks(run, "epoch-002", {(4, 1): 0.5})
    for stage, critical, dense in (("base", 0.123, 0.45), ("epoch-000", 0.9, 0.99), ("epoch-002", 0.654, 0.41)):
        write_masking(run, stage, critical, dense)
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
    write_samples(run)
    return run


def write_samples(run: Path) -> None:
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
