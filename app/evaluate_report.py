"""The figures of an evaluation as a table, as JSON and as curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from app.train.figures import GIVEN, METHODS, METRICS, PREDICTION, SART, SHUFFLED, ZERO_NETWORK, StageFigures

HEADINGS = {
    "psnr_db": "PSNR3D dB",
    "x2ct_psnr_db": "X2CT dB",
    "ssim": "SSIM",
    "mae_all_hu": "MAE HU",
    "mae_lung_hu": "lung",
    "mae_soft_hu": "soft",
    "mae_bone_hu": "bone",
    "projection_error_percent": "proj. error %",
}
DECIMALS = {"ssim": 3, "mae_all_hu": 0, "mae_lung_hu": 0, "mae_soft_hu": 0, "mae_bone_hu": 0}
PATIENTS = {
    "val": "held-out patients",
    "test": "test patients",
    "train": "TRAINING patients: this says what was learned by heart",
}
COMPARISONS = {
    "gain over c": (PREDICTION, GIVEN),
    "gain over the zero network": (PREDICTION, ZERO_NETWORK),
    f"gain over {SART}": (PREDICTION, SART),
    "X-ray use": (PREDICTION, SHUFFLED),
}
SCALARS = ("psnr_db", "x2ct_psnr_db", "ssim", "mae_all_hu", "projection_error_percent")


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (over n - 1) of what is a number; nan where nothing is."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    mean = sum(known) / len(known)
    spread = math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1)) if len(known) > 1 else math.nan
    return mean, spread


def table(found: Sequence[StageFigures], patients: str) -> str:
    """For a terminal: every method with every metric, then what the network adds, then its curves."""
    return "\n\n".join(_stage_table(figures, patients) for figures in found)


def _stage_table(figures: StageFigures, patients: str) -> str:
    rows = [["", *HEADINGS.values()]]
    for method in METHODS:
        cells = []
        for metric in METRICS:
            mean, spread = mean_and_spread(figures.values(method, metric))
            cells.append(_number(mean, spread, DECIMALS.get(metric, 2)))
        rows.append([method, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{figures.stage}, epoch {figures.epoch}: {len(figures.cases)} {PATIENTS[patients]}, {figures.steps} sampler "
        f"steps, {figures.samples} sample{'s averaged' if figures.samples > 1 else ''}, "
        f"{figures.seconds_per_volume:.1f} s per volume; mean +- spread over the cases"
    ]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(["", row[0].ljust(widths[0]), *cells]).rstrip())
    for name, (method, other) in COMPARISONS.items():
        lines.append(f"  {name}: {_number(*mean_and_spread(figures.differences(method, other)), 2)} dB")
    if figures.by_steps:
        points = ", ".join(f"{steps}: {psnr:.2f}" for steps, psnr in figures.by_steps.items())
        lines.append(f"  PSNR in dB by sampler steps, first cases: {points}")
        points = ", ".join(f"{snr:.1f}: {100 * left:.0f}" for snr, (_, left) in figures.by_level.items())
        lines.append(f"  share of c's square error left by one evaluation, in %, by log SNR: {points}")
    return "\n".join(lines)


def _number(mean: float, spread: float, decimals: int) -> str:
    if math.isnan(mean):
        return "-"
    text = f"{mean:.{decimals}f}"
    return text if math.isnan(spread) else f"{text} +- {spread:.{decimals}f}"


def as_json(found: Sequence[StageFigures], patients: str) -> dict[str, Any]:
    """Every figure of every case, and means; nan is null."""
    return {"patients": patients, "stages": {figures.stage: _stage_json(figures) for figures in found}}


def _stage_json(figures: StageFigures) -> dict[str, Any]:
    means = {
        method: {metric: _plain(mean_and_spread(figures.values(method, metric))[0]) for metric in METRICS}
        for method in METHODS
    }
    compared = {
        name: [_plain(value) for value in mean_and_spread(figures.differences(method, other))]
        for name, (method, other) in COMPARISONS.items()
    }
    cases = {
        case: {
            method: {metric: _plain(value) for metric, value in values.items()} for method, values in methods.items()
        }
        for case, methods in figures.cases.items()
    }
    return {
        "epoch": figures.epoch,
        "sampler_steps": figures.steps,
        "samples": figures.samples,
        "seconds_per_volume": figures.seconds_per_volume,
        "mean": means,
        "db_and_spread": compared,
        "psnr_db_by_sampler_steps": figures.by_steps,
        "psnr_db_and_share_of_the_error_of_c_by_log_snr": figures.by_level,
        "cases": cases,
    }


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def scalars(figures: StageFigures) -> dict[str, float]:
    """Tags and values for TensorBoard, of the prediction and of c; what is not a number is left out."""
    values = {}
    for method, name in ((PREDICTION, "eval"), (GIVEN, "eval_c")):
        for metric in SCALARS:
            values[f"{figures.stage}/{name}_{metric}"] = mean_and_spread(figures.values(method, metric))[0]
    values[f"{figures.stage}/eval_gain_over_c_db"] = mean_and_spread(figures.differences(PREDICTION, GIVEN))[0]
    values[f"{figures.stage}/eval_xray_use_db"] = mean_and_spread(figures.differences(PREDICTION, SHUFFLED))[0]
    return {tag: value for tag, value in values.items() if not math.isnan(value)}
