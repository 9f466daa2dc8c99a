"""Table and figure of docs/experiments/natural-defects.md, from the run folders.

    python docs/experiments/natural_defects.py summary RUN [RUN ...] > natural-defects.json
    python docs/experiments/natural_defects.py table natural-defects.json
    python docs/experiments/natural_defects.py figure natural-defects.json natural-defects.png

Legend: P prompts, S sigmas, K scopes, R ratios, Ly layers, h heads, E eps values.
"""

import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer.callbacks.figures import PALETTE
from trainer.callbacks.measurement_files import load_arrays, save_figure

Arrays = Mapping[str, np.ndarray]
_DRAWS = 2000


def relative_increase(masking: Arrays, scope: str, ratio: float, *, seed: int = 0) -> tuple[float, float, float]:
    """dL(r) / L(0) of a scope with its 95 % interval: a bootstrap that draws prompts, all sigmas of one together."""
    at, r = masking["scopes"].tolist().index(scope), int(np.argmin(np.abs(masking["ratios"] - ratio)))
    dense = masking["dense_loss_by_probe"].astype(np.float64).mean(axis=1)  # (P,)
    masked = masking["loss_by_probe"][:, :, at, r].astype(np.float64).mean(axis=1)
    drawn = np.random.default_rng(seed).integers(len(dense), size=(_DRAWS, len(dense)))
    values = (masked[drawn] - dense[drawn]).mean(axis=1) / dense[drawn].mean(axis=1)
    low, high = np.quantile(values, [0.025, 0.975])
    return float((masked - dense).mean() / dense.mean()), float(low), float(high)


def _stage(run: Path, stage: str, step: int) -> dict[str, Any]:
    sinks = load_arrays(run / "measurements" / f"sinks-{stage}.npz")
    activations = load_arrays(run / "measurements" / f"activations-{stage}.npz")
    at = sinks["eps"].tolist().index(sinks["default_eps"])

    def largest(name: str) -> list[float]:
        return sinks[name].mean(axis=(0, 1)).reshape(-1, len(sinks["eps"])).max(axis=0).tolist()

    alpha = sinks["alpha"].mean(axis=(0, 1))
    layer, head = np.unravel_index(alpha.argmax(), alpha.shape)
    times = (activations["largest"] / activations["median"]).mean(axis=(0, 1))
    return {
        "step": step,
        "consistent_heads": int(sinks["consistent"].sum()),
        "heads_with_any_sink": int((sinks["frequency"][..., at] > 0).any(axis=0).sum()),
        "eps": sinks["eps"].tolist(),
        "vision_share": largest("fraction"),
        "text_share": largest("text_fraction"),
        "alpha": float(alpha.max()),
        "alpha_at": [int(sinks["layers"][layer]), int(head)],
        "alpha_value_norm_ratio": float(sinks["value_norm_ratio"].mean(axis=(0, 1))[layer, head]),
        "alpha_times_keys": float(alpha.max() * sinks["keys_count"]),
        "text_alpha": float(sinks["text_alpha"].mean(axis=(0, 1)).max()),
        "times_median": times.tolist(),
        "largest_activation": float(activations["largest"].max()),
        "massive": int(activations["massive"].sum()),
    }


def _masking(run: Path, stage: str) -> dict[str, Any]:
    masking = load_arrays(run / "measurements" / f"masking-{stage}.npz")
    dense = float(masking["dense_loss"])
    scopes = {
        str(scope): {
            "critical_ratio": float(masking["critical_ratio"][k]),
            "uniform": float(masking["uniform_loss_increase"][k]) / dense,
            "dropped_mass": masking["dropped_mass"][k].tolist(),
            "increase": {f"{r:g}": relative_increase(masking, str(scope), r) for r in masking["ratios"]},
        }
        for k, scope in enumerate(masking["scopes"])
    }
    return {"dense_loss": dense, "ratios": masking["ratios"].tolist(), "scopes": scopes}


def summary(run: Path) -> dict[str, Any]:
    """All figures of one run that the table and the figure show."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [(int(row["step"]) + 1, float(row["val/loss"])) for row in rows if row.get("val/loss")]
    rates = [float(row["train/samples_per_s"]) for row in rows if row.get("train/samples_per_s")]
    measured = [(int(row["step"]), row) for row in rows if row.get("sinks/heads")]
    stages = [_stage(run, f"epoch-{number:03d}", step) for number, (step, _) in enumerate(measured)]
    last = max(int(row["step"]) for row in rows if row.get("train/loss"))
    return {
        "run": run.name,
        "validation_loss": losses,
        "samples_per_s": float(np.median(rates)),
        "stages": [*stages, _stage(run, "validate", last + 1)],
        "masking": _masking(run, "validate"),
    }


def _rows(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def table(runs: list[dict[str, Any]]) -> str:
    """The results as Markdown: one table of runs, one of layers."""
    ends = [run["stages"][-1] for run in runs]
    eps, at = ends[0]["eps"], ends[0]["eps"].index(0.3)

    def numbers(values: list[float], digits: int = 3) -> str:
        return ", ".join(f"{value:.{digits}f}" for value in values)

    def by_run(name: str, say: Any) -> list[str]:
        return [name, *(say(run, end) for run, end in zip(runs, ends, strict=True))]

    sweep = numbers(eps, 2)
    whole = _rows(["", *(run["run"] for run in runs)], [
        by_run("validation loss after each epoch", lambda r, e: numbers([v for _, v in r["validation_loss"]], 4)),
        by_run("heads that grew a sink", lambda r, e: str(e["consistent_heads"])),
        by_run("heads with a sink on any probe", lambda r, e: str(e["heads_with_any_sink"])),
        by_run(f"largest share of queries on one vision key, eps {sweep}", lambda r, e: numbers(e["vision_share"])),
        by_run("the same at eps 0.3, by stage", lambda r, e: numbers([s["vision_share"][at] for s in r["stages"]])),
        by_run(f"largest share of queries on one text key, eps {sweep}", lambda r, e: numbers(e["text_share"])),
        by_run("the same at eps 0.3, by stage", lambda r, e: numbers([s["text_share"][at] for s in r["stages"]])),
        by_run("largest alpha of a vision key", lambda r, e: f"{e['alpha']:.4f}"),
        by_run("that times the number of keys", lambda r, e: f"{e['alpha_times_keys']:.1f}"),
        by_run("its layer, head and value-norm ratio", lambda r, e: "{}, {}, {:.2f}".format(
            *e["alpha_at"], e["alpha_value_norm_ratio"])),
        by_run("largest alpha of a text key", lambda r, e: f"{e['text_alpha']:.3f}"),
        by_run("largest activation", lambda r, e: f"{e['largest_activation']:.1f}"),
        by_run("largest over median, at the depth where it is largest", lambda r, e: f"{max(e['times_median']):.1f}"),
        by_run("massive activations", lambda r, e: str(e["massive"])),
    ])  # fmt: skip

    def masked(run: dict[str, Any], scope: str) -> str:
        found = run["masking"]["scopes"][scope]
        spans = [
            "{:.2f} ({:.2f} to {:.2f})".format(*(100 * value for value in found["increase"][ratio]))
            for ratio in ("0.5", "0.9")
        ]
        at_least = "≥ " if found["critical_ratio"] >= run["masking"]["ratios"][-1] else ""
        return f"{at_least}{found['critical_ratio']:.2f} | {' | '.join(spans)} | {100 * found['uniform']:.1f}"

    columns = ["r*", "dL/L at 0.5 in %", "dL/L at 0.9 in %", "uniform in %"]
    layers = _rows(
        ["masked", *(f"{run['run']}: {column}" for run in runs for column in columns)],
        [[scope, *(masked(run, scope) for run in runs)] for scope in runs[0]["masking"]["scopes"]],
    )
    return "\n".join([*whole, "", *layers])


def figure(runs: list[dict[str, Any]]) -> Figure:
    """Loss, sinks, activations and masking of all runs."""
    drawn = Figure(figsize=(12, 8), layout="constrained")
    (loss, sinks), (depth, masking) = drawn.subplots(2, 2)
    for index, run in enumerate(runs):
        colour, shown = PALETTE[(6, 4, 3, 1)[index % 4]], {"marker": "os^D"[index % 4], "markersize": 5}
        loss.plot(*zip(*run["validation_loss"], strict=True), color=colour, label=run["run"], **shown)
        steps = [stage["step"] for stage in run["stages"]]
        at = run["stages"][0]["eps"].index(0.3)
        for name, style in (("vision_share", "-"), ("text_share", "--")):
            label = f"{run['run']}, {name.split('_')[0]} keys"
            sinks.plot(steps, [s[name][at] for s in run["stages"]], color=colour, linestyle=style, label=label, **shown)
        for stage, style in ((run["stages"][1], ":"), (run["stages"][-1], "-")):
            label = f"{run['run']}, step {stage['step']}"
            depth.plot(stage["times_median"], color=colour, linestyle=style, label=label, **shown)
        scopes = {name: found for name, found in run["masking"]["scopes"].items() if name != "all"}
        places = np.arange(len(scopes)) + 0.16 * (index - (len(runs) - 1) / 2)
        for ratio, fill in (("0.5", "none"), ("0.9", colour)):
            found = np.array([scope["increase"][ratio] for scope in scopes.values()]) * 100
            spread = np.abs(found[:, 1:] - found[:, :1]).T
            masking.errorbar(
                places, found[:, 0], spread, fmt=shown["marker"], color=colour, markerfacecolor=fill, markersize=4,
                linewidth=1, label=f"{run['run']}, {ratio} removed",
            )  # fmt: skip
        uniform = [100 * scope["uniform"] for scope in scopes.values()]
        masking.plot(places, uniform, "_", color=colour, markersize=10, label=f"{run['run']}, uniform attention")
    loss.set(xlabel="step", ylabel="validation loss", title="Validation loss (256 held-out clips)")
    sinks.axhline(0.5, color="black", linestyle=":", linewidth=1)
    sinks.set(
        xlabel="step", ylabel="share of queries", ylim=(0, 0.55), title="Largest share of queries on one key (eps 0.3)"
    )
    depth.set(xlabel="blocks passed", ylabel="largest over median", title="Residual stream, vision tokens")
    masking.axhline(1.0, color="black", linestyle=":", linewidth=1)
    masking.set_yscale("symlog", linthresh=0.1)
    masking.set_ylim(-0.15, 100)
    masking.set(xlabel="layer masked alone", ylabel="loss increase in %", title="Masking one layer (95 % intervals)")
    for axes in (loss, sinks, depth, masking):
        axes.grid(True, color="0.88", linewidth=0.6)
        axes.legend(fontsize=7, frameon=False, handlelength=3.5)
    return drawn


def main(words: list[str]) -> None:
    """See the head of this file."""
    verb, *paths = words or [""]
    if verb == "summary" and paths:
        print(json.dumps([summary(Path(path)) for path in paths], separators=(",", ":")))
    elif verb == "table" and len(paths) == 1:
        print(table(json.loads(Path(paths[0]).read_text())))
    elif verb == "figure" and len(paths) == 2:
        save_figure(Path(paths[1]), figure(json.loads(Path(paths[0]).read_text())))
    else:
        sys.exit(f"error: got {words}, expected: summary RUN ..., table JSON, or figure JSON PNG")


if __name__ == "__main__":
    main(sys.argv[1:])
