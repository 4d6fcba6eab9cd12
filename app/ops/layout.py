"""The layout of TensorBoard's Custom Scalars page: what a person compares, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent

from app.tags import (
    COST,
    COST_AT_END,
    DATA_WAIT,
    MFU,
    PHYSICS_WEIGHT,
    VAL_GAIN,
    VAL_PROJECTION_ERROR,
    VAL_PSNR,
    VAL_XRAY_USE,
)

EVERY_STAGE = r"stage_\d+"
COMPARED = {
    "Validation loss": "val_loss",
    "Training loss": "train_loss",
    "Validation PSNR (dB)": VAL_PSNR,
}
LEARNED = {
    "Gain over the given volume (dB)": VAL_GAIN,
    "Use of the X-rays (dB)": VAL_XRAY_USE,
    "Projection error (%)": VAL_PROJECTION_ERROR,
}
MACHINE = {
    "GPU utilisation (%)": [r"gpu/\d+/utilization_percent"],
    "GPU memory (GiB)": [r"gpu/\d+/memory_gib"],
    "GPU power (W)": [r"gpu/\d+/power_w"],
    "GPU temperature (C)": [r"gpu/\d+/temperature_c"],
    "Data wait and MFU (shares)": [DATA_WAIT, MFU],
    "CPU of the machine (%)": ["host/cpu_percent"],
    "RAM and the container's limit (GiB)": ["host/(ram|container_ram|container_ram_limit|trainer_ram)_gib"],
    "Disk: free, and needed by the run (GiB)": ["host/disk_(free|needed)_gib"],
}


def layout(stages: Sequence[str]) -> bytes:
    """The serialized layout for `stages`: stage comparison, each stage's halves of the loss, schedules, the machine.

    Each line of a chart is a regular expression over tags, matched from the tag's first character on.
    """
    return bytes(
        Layout(
            category=[
                Category(
                    title="Stage comparison",
                    chart=[_chart(title, [f"{EVERY_STAGE}/{tag}"]) for title, tag in COMPARED.items()],
                ),
                Category(
                    title="What the networks add",
                    chart=[_chart(title, [f"{EVERY_STAGE}/{tag}"]) for title, tag in LEARNED.items()],
                ),
                Category(title="Training vs validation", chart=[_train_and_validation(stage) for stage in stages]),
                Category(
                    title="Diffusion vs physics",
                    chart=[_halves(stage, part) for stage in stages for part in ("train", "val")],
                ),
                Category(
                    title="Schedule and speed",
                    chart=[
                        _chart("Learning rate", [f"{EVERY_STAGE}/learning_rate"]),
                        _chart("Physics weight", [f"{EVERY_STAGE}/{PHYSICS_WEIGHT}"]),
                        _chart("Epoch time (s)", [f"{EVERY_STAGE}/epoch_time"]),
                        _chart("Cost so far and at the end (USD)", [COST, COST_AT_END]),
                    ],
                ),
                Category(
                    title="GPU and host", chart=[_chart(title, expressions) for title, expressions in MACHINE.items()]
                ),
            ]
        ).SerializeToString()
    )


def _train_and_validation(stage: str) -> Chart:
    return _chart(f"{stage}: loss", [f"{stage}/train_loss", f"{stage}/val_loss"])


def _halves(stage: str, part: str) -> Chart:
    title = {"train": "training", "val": "validation"}[part]
    return _chart(f"{stage}: {title}", [f"{stage}/{part}_diffusion", f"{stage}/{part}_physics"])


def _chart(title: str, expressions: list[str]) -> Chart:
    return Chart(title=title, multiline=MultilineChartContent(tag=[f"{expression}$" for expression in expressions]))
