"""Pictures for people: slices of a volume and its radiographs, side by side.

Volumes are (D, H, W) in HU with axes (z inferior->superior, y anterior->posterior, x right->left); radiographs are
(2, Nv, Nu) line integrals with rows inferior->superior. In the pictures superior is up and the patient's left
is on the viewer's right; on sagittal slices and the lateral view anterior is on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Floats = npt.NDArray[np.float32]
Picture = npt.NDArray[np.uint8]
Colours = tuple[tuple[int, int, int], ...]

SMALLEST_TILE = 160
"""Pixels; smaller cubes are enlarged by a whole factor, voxels staying visible."""
MARGIN = 6
HEADER = 22
ROW_LABEL = 20
FONT_SIZE = 13
DISPLAY_HU = (-1000.0, 800.0)
LUNG_HU = (-1350.0, 150.0)
MEDIASTINUM_HU = (-160.0, 240.0)
"""The two windows in which a thorax CT is read: level -600 width 1500, level 40 width 400."""
LARGEST_ERROR_HU = 500.0
LARGEST_DIFFERENCE = 0.1
"""Share of the X-ray's brightest line integral at which the colours of the signed difference end."""
BACKGROUND = 24
BAR_HEIGHT = 14
INK = (225, 225, 225)
LETTERS = (255, 220, 90)

ERROR_COLOURS = ((0, 0, 0), (70, 10, 90), (190, 50, 60), (250, 160, 30), (255, 255, 200))
DIFFERENCE_COLOURS = ((40, 110, 255), (15, 30, 80), (0, 0, 0), (90, 25, 15), (255, 90, 40))


@dataclass(frozen=True)
class Direction:
    """One direction of looking at a patient."""

    name: str
    ends: str
    """Letters at the left and right edge of the picture."""


PLANES = (Direction("axial", "RL"), Direction("coronal", "RL"), Direction("sagittal", "AP"))
VIEWS = (Direction("frontal", "RL"), Direction("lateral", "AP"))
SLICE_COLUMNS = ("truth", "prediction", "|error|", "condition")
VIEW_COLUMNS = ("X-ray", "DRR of prediction", "DRR - X-ray", "colours")
SAMPLE_WINDOWS = {"lung": LUNG_HU, "mediastinum": MEDIASTINUM_HU}
SAMPLE_PLACES = {"middle": 1 / 2, "at a third": 1 / 3}
"""Shares of an axis from its inferior, anterior or right end. The middle sagittal slice shows no lung."""


@dataclass(frozen=True)
class Section:
    """Rows of tiles under the same headings."""

    columns: Sequence[str]
    rows: Sequence[tuple[Direction, list[Picture]]]


class PanelCase(Protocol):
    """One validation case: what is known of it and what the model made."""

    @property
    def title(self) -> str:
        """Shown above the picture: pseudonym, stage, epoch."""

    @property
    def truth(self) -> Floats:
        """(D, H, W) HU."""

    @property
    def prediction(self) -> Floats:
        """(D, H, W) HU."""

    @property
    def condition(self) -> Floats:
        """(D, H, W) HU: the prior, or the previous stage's volume."""

    @property
    def xrays(self) -> Floats:
        """(2, Nv, Nu) line integrals, frontal and lateral."""

    @property
    def drr(self) -> Floats:
        """(2, Nv, Nu) line integrals of the prediction."""


def validation_panel(case: PanelCase) -> Picture:
    """The case as one picture, (H, W, 3) uint8.

    Rows: axial, coronal and sagittal middle slice, then both views. Columns of the slices: truth, prediction, absolute
    error, condition; of the views: X-ray, DRR of the prediction, DRR minus X-ray, scale of the colours.

    Raises:
        ValueError: arrays that belong together differ in shape.
    """
    return _panel(case, {"": DISPLAY_HU})


def evaluation_panel(case: PanelCase) -> Picture:
    """As `validation_panel`, with the slices in the lung and in the mediastinal window."""
    return _panel(case, {", lung": LUNG_HU, ", mediastinum": MEDIASTINUM_HU})


def _panel(case: PanelCase, windows: Mapping[str, tuple[float, float]]) -> Picture:
    for name, like in (("prediction", "truth"), ("condition", "truth"), ("drr", "xrays")):
        found, expected = getattr(case, name).shape, getattr(case, like).shape
        if found != expected:
            raise ValueError(f"{name} has shape {found}, expected that of {like}: {expected}")
    tile = _tile_edge(case.truth.shape[0])
    brightest = max(float(case.xrays.max()), 1e-6)
    slices = [_slices(case, plane.name, tile, window) for window in windows.values() for plane in PLANES]
    directions = [Direction(plane.name + label, plane.ends) for label in windows for plane in PLANES]
    frontal, lateral = (_view(case, view, brightest, tile) for view in range(len(VIEWS)))
    frontal.append(_scale(ERROR_COLOURS, "0", f"{LARGEST_ERROR_HU:.0f} HU", "error", tile))
    edge = f"{LARGEST_DIFFERENCE * brightest:.2g}"
    lateral.append(_scale(DIFFERENCE_COLOURS, f"-{edge}", f"+{edge}", "DRR - X-ray", tile))
    sections = [
        Section(SLICE_COLUMNS, list(zip(directions, slices, strict=True))),
        Section(VIEW_COLUMNS, list(zip(VIEWS, (frontal, lateral), strict=True))),
    ]
    return _compose(case.title, sections, tile)


def sample_panel(title: str, xrays: Floats, drr: Floats, hu: Floats, shown: Sequence[bool]) -> Picture:
    """A volume that was made from radiographs, (H, W, 3) uint8.

    Rows: both views, with the X-ray as used, the DRR of the volume, and their difference; then axial, coronal and
    sagittal slices in the lung and the mediastinal window.

    Args:
        title: above the picture.
        xrays: (2, Nv, Nu) line integrals as used.
        drr: (2, Nv, Nu) line integrals of the volume.
        hu: (D, H, W) the volume.
        shown: which of the two views were given.
    """
    tile = _tile_edge(hu.shape[0])
    brightest = max(float(drr.max()), *(float(xrays[view].max()) for view in range(len(VIEWS)) if shown[view]), 1e-6)
    edge = f"{LARGEST_DIFFERENCE * brightest:.2g}"
    colours = _scale(DIFFERENCE_COLOURS, f"-{edge}", f"+{edge}", "DRR - X-ray", tile)
    absent = _text_tile("not given", tile)
    views = []
    for view, direction in enumerate(VIEWS):
        xray, made, difference = _radiographs(xrays[view], drr[view], brightest, tile)
        views.append((direction, [xray, made, difference, colours] if shown[view] else [absent, made]))
    slices = [
        (
            plane,
            [
                _enlarge(_grey_hu(slice_at(hu, plane.name, share), window), tile)
                for share in SAMPLE_PLACES.values()
                for window in SAMPLE_WINDOWS.values()
            ],
        )
        for plane in PLANES
    ]
    columns = [f"{window}, {place}" for place in SAMPLE_PLACES for window in SAMPLE_WINDOWS]
    return _compose(title, [Section(("X-ray as used", *VIEW_COLUMNS[1:]), views), Section(columns, slices)], tile)


def middle_slice(volume: Floats, plane: str) -> Floats:
    """The middle slice of (D, H, W), see `slice_at`."""
    return slice_at(volume, plane, 1 / 2)


def slice_at(volume: Floats, plane: str, share: float) -> Floats:
    """A slice of (D, H, W) as a person sees it: superior up, the patient's left or back on the right.

    Args:
        volume: the cube.
        plane: axial, coronal or sagittal.
        share: where along the plane's normal, from 0 (inferior, anterior, right) to 1.
    """
    z, y, x = (int(edge * share) for edge in volume.shape)
    if plane == "axial":
        image: Floats = volume[z]
        return image
    return np.flip(volume[:, y] if plane == "coronal" else volume[:, :, x], axis=0)


def _slices(case: PanelCase, plane: str, tile: int, window: tuple[float, float]) -> list[Picture]:
    truth, prediction, condition = (
        middle_slice(volume, plane) for volume in (case.truth, case.prediction, case.condition)
    )
    error = _coloured(np.abs(prediction - truth) / LARGEST_ERROR_HU, ERROR_COLOURS)
    images = (_grey_hu(truth, window), _grey_hu(prediction, window), error, _grey_hu(condition, window))
    return [_enlarge(image, tile) for image in images]


def _view(case: PanelCase, view: int, brightest: float, tile: int) -> list[Picture]:
    return _radiographs(case.xrays[view], case.drr[view], brightest, tile)


def _radiographs(xray: Floats, drr: Floats, brightest: float, tile: int) -> list[Picture]:
    xray, drr = (np.flip(image, axis=0) / brightest for image in (xray, drr))
    difference = _coloured(0.5 + 0.5 * (drr - xray) / LARGEST_DIFFERENCE, DIFFERENCE_COLOURS)
    return [_enlarge(image, tile) for image in (_grey(xray), _grey(drr), difference)]


def _grey_hu(image: Floats, window: tuple[float, float]) -> Picture:
    low, high = window
    return _grey((image - low) / (high - low))


def _grey(share: Floats) -> Picture:
    return _coloured(share, ((0, 0, 0), (255, 255, 255)))


def _coloured(share: Floats, colours: Colours) -> Picture:
    """(H, W) with 0 at the first and 1 at the last colour -> (H, W, 3)."""
    stops = np.linspace(0.0, 1.0, len(colours))
    channels = [np.interp(share, stops, channel) for channel in zip(*colours, strict=True)]
    picture: Picture = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return picture


def _enlarge(image: Picture, tile: int) -> Picture:
    """A square tile; pixels stay sharp squares."""
    return np.asarray(Image.fromarray(image).resize((tile, tile), Image.Resampling.NEAREST))


def _tile_edge(voxels: int) -> int:
    return voxels * -(-SMALLEST_TILE // voxels)


def _scale(colours: Colours, low: str, high: str, title: str, tile: int) -> Picture:
    """A tile with a colour bar and what its ends mean."""
    image = Image.new("RGB", (tile, tile), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(image)
    width, top = tile - 2 * MARGIN, tile // 2 - BAR_HEIGHT // 2
    bar = _coloured(np.linspace(0, 1, width, dtype=np.float32)[None].repeat(BAR_HEIGHT, axis=0), colours)
    image.paste(Image.fromarray(bar), (MARGIN, top))
    font = ImageFont.load_default(FONT_SIZE)
    draw.text((tile // 2, top - MARGIN), title, INK, font, anchor="ms")
    draw.text((MARGIN, top + BAR_HEIGHT + MARGIN), low, INK, font, anchor="lt")
    draw.text((MARGIN + width, top + BAR_HEIGHT + MARGIN), high, INK, font, anchor="rt")
    return np.asarray(image)


def _text_tile(text: str, tile: int) -> Picture:
    image = Image.new("RGB", (tile, tile), (BACKGROUND,) * 3)
    ImageDraw.Draw(image).text((tile // 2, tile // 2), text, INK, ImageFont.load_default(FONT_SIZE), anchor="mm")
    return np.asarray(image)


def _compose(title: str, sections: Sequence[Section], tile: int) -> Picture:
    step = tile + MARGIN
    width = ROW_LABEL + MARGIN + max(len(section.columns) for section in sections) * step
    height = (1 + len(sections)) * HEADER + sum(len(section.rows) for section in sections) * step
    image = Image.new("RGB", (width, height), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(FONT_SIZE)
    draw.text((MARGIN, HEADER // 2), title, INK, font, anchor="lm")
    y = HEADER
    for section in sections:
        for column, name in enumerate(section.columns):
            x = ROW_LABEL + MARGIN + column * step + tile // 2
            draw.text((x, y + HEADER // 2), name, INK, font, anchor="mm")
        y += HEADER
        for direction, row in section.rows:
            _paste_upright(image, direction.name, (MARGIN // 2, y), tile)
            for column, picture in enumerate(row):
                image.paste(Image.fromarray(picture), (ROW_LABEL + MARGIN + column * step, y))
            for letter, x, anchor in zip(direction.ends, (3, tile - 3), ("lt", "rt"), strict=True):
                draw.text((ROW_LABEL + MARGIN + x, y + 3), letter, LETTERS, font, anchor=anchor)
            y += step
    return np.asarray(image)


def _paste_upright(image: Image.Image, text: str, corner: tuple[int, int], height: int) -> None:
    label = Image.new("RGB", (height, ROW_LABEL), (BACKGROUND,) * 3)
    ImageDraw.Draw(label).text((height // 2, ROW_LABEL // 2), text, INK, ImageFont.load_default(FONT_SIZE), anchor="mm")
    image.paste(label.rotate(90, expand=True), corner)
