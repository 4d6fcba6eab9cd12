"""`progress.png`: the whole run in one picture, for a look without TensorBoard.

The points come from the event files, so that the picture is complete after a resume and shows what TensorBoard shows.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from app.ops.event_files import EventReader
from app.tags import PHYSICS_WEIGHT, STAGE_TAG, VAL_PSNR
from app.workspace import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES = (16.0, 9.0)
DPI = 90
SHARE = 0.01
"""Of the time, at most, that training waits for the picture."""
MARGINS = {"left": 0.04, "right": 0.99, "bottom": 0.06, "top": 0.91, "wspace": 0.14, "hspace": 0.4}
COLOURS = ("#4c9be8", "#f28e2b", "#59b36a", "#c46bd6", "#e15759", "#9c9c9c")


@dataclass(frozen=True)
class Chart:
    """One pair of axes: which tags it shows and how."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """(tag without the stage, matplotlib line style)."""
    log: bool = False


CHARTS = (
    Chart("loss (dashed: training)", (("val_loss", "-"), ("train_loss", "--")), log=True),
    Chart("diffusion (dashed: training)", (("val_diffusion", "-"), ("train_diffusion", "--")), log=True),
    Chart("physics (dashed: training)", (("val_physics", "-"), ("train_physics", "--")), log=True),
    Chart("learning rate", (("learning_rate", "-"),), log=True),
    Chart("validation PSNR, dB", ((VAL_PSNR, "-"),)),
    Chart("physics weight", ((PHYSICS_WEIGHT, "-"),)),
)


@dataclass
class Series:
    """The points of one tag, in the order in which they were logged."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


class ProgressPicture:
    """Draws `progress.png`; each call reads only what was logged since the last one.

    Args:
        path: the picture.
        tensorboard: the run's event files, after `rewind`.
        stages: names of all stages, in order.
        clock: seconds, monotonic.
    """

    def __init__(
        self, path: Path, tensorboard: Path, stages: Sequence[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._clock = clock
        self._due = clock()
        self._reader = EventReader(tensorboard)
        self._stages = tuple(stages)
        self._series: dict[str, Series] = {}
        self._picture: tuple[str, bytes] | None = None

    def write_sometimes(self, headline: str, eta_s: float | None) -> None:
        """The same as `write`, unless the last one is so short ago that pictures would take more than a `SHARE`."""
        began = self._clock()
        if began >= self._due:
            self.write(headline, eta_s)
            ended = self._clock()
            self._due = ended + (ended - began) / SHARE

    def write(self, headline: str, eta_s: float | None) -> None:
        """Replaces the picture by one of everything that was flushed so far.

        Args:
            headline: where the run stands, such as `stage_32, epoch 3 of 10`.
            eta_s: estimated seconds to the end of the run; None if unknown.
        """
        self._read()
        figure = self._draw(headline, eta_s)
        with atomic_file(self._path) as file:
            figure.savefig(file, format="png", dpi=DPI, pil_kwargs={"compress_level": 1})

    def _read(self) -> None:
        for event in self._reader.poll():
            for value in event.summary.value:
                if STAGE_TAG.fullmatch(value.tag) is None:
                    continue
                if value.HasField("image"):
                    self._picture = (f"{value.tag}, epoch {event.step}", value.image.encoded_image_string)
                elif value.HasField("simple_value") and not value.tag.endswith("_step"):
                    series = self._series.setdefault(value.tag, Series())
                    series.steps.append(event.step)
                    series.values.append(value.simple_value)

    def _draw(self, headline: str, eta_s: float | None) -> Figure:
        # Imported late: it costs a second that most commands need not spend. No pyplot, whose state is global.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=SIZE_INCHES)
        FigureCanvasAgg(figure)
        figure.suptitle(f"{headline}    {_eta(eta_s)}    {_now()}", fontsize=12)
        # Fixed margins: letting matplotlib find them doubles the time.
        grid = figure.add_gridspec(3, 3, width_ratios=(1, 1, 1.35), **MARGINS)
        for index, chart in enumerate(CHARTS):
            self._draw_chart(figure.add_subplot(grid[index // 2, index % 2]), chart)
        self._draw_picture(figure.add_subplot(grid[:, 2]))
        return figure

    def _draw_chart(self, axes: Axes, chart: Chart) -> None:
        for index, stage in enumerate(self._stages):
            for tag, style in chart.lines:
                series = self._series.get(f"{stage}/{tag}")
                if series is None:
                    continue
                label = stage if (tag, style) == chart.lines[0] else None
                colour = COLOURS[index % len(COLOURS)]
                axes.plot(series.steps, series.values, style, color=colour, label=label, marker=".", markersize=3)
        axes.set_title(chart.title, fontsize=10)
        axes.tick_params(labelsize=8, which="both")
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.set_xlabel("completed epochs", fontsize=8)
            axes.locator_params(axis="x", integer=True)
            axes.legend(fontsize=8)
            if chart.log and any(np.asarray(line.get_ydata(), dtype=float).max() > 0 for line in axes.lines):
                axes.set_yscale("log")
        else:
            axes.text(0.5, 0.5, "no points yet", ha="center", va="center", transform=axes.transAxes)

    def _draw_picture(self, axes: Axes) -> None:
        axes.set_axis_off()
        if self._picture is None:
            axes.text(0.5, 0.5, "no pictures yet", ha="center", va="center", transform=axes.transAxes)
            return
        title, encoded = self._picture
        axes.set_title(title, fontsize=10)
        axes.imshow(np.asarray(Image.open(io.BytesIO(encoded))))


def _eta(seconds: float | None) -> str:
    if seconds is None:
        return "time left: unknown"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"time left: {hours} h {minutes:02d} min" if hours else f"time left: {minutes} min"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
