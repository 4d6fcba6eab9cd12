"""The command line of `sample`, without the libraries that every other command would wait for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from app.argument_types import count, number, positive, relaxation
from app.errors import ConfigError

DESCRIPTION = """\
Turn one or two radiographs into a CT volume in HU, a NIfTI file, and a picture beside it (ct.png).

Images are png, jpg, npy or DICOM (CR, DX, DR, RF). Row 0 is superior; column 0 is the patient's right (frontal, PA) or
front (lateral, left side at the detector). DICOM files that say how they lie are turned; others must lie so. A number
that follows --intensity, --pixel-mm, --gain or --offset is for both images, two are for the frontal and the lateral.

The cascade is read from a run (--config, RUN_NAME) or from a file of `python -m app export` (--model). It was trained
with one geometry; radiographs of another are scaled so that the plane through the isocentre fits.

Values become line integrals by p = a t + b, t being the reading that --intensity names; a and b are fitted to the
projection of the training cases' mean, unless they are given. Research use, not for clinical use.
"""
INTENSITY_NAMES = ("line-integrals", "inverted-line-integrals", "linear", "inverted-linear")
PRESET_NAMES = ("chest_stand", "c_arm", "luna16")
OUT_SUFFIXES = (".nii.gz", ".nii")
CALIBRATED = "line-integrals"

Value = TypeVar("Value")


@dataclass(frozen=True)
class ViewPlan:
    """One radiograph and what is said of it; None is left to its file or to the fit."""

    view: str
    path: Path
    intensity: str | None
    pixel_mm: float | None
    gain: float | None
    offset: float | None


@dataclass(frozen=True)
class SamplePlan:
    """What is asked for."""

    views: tuple[ViewPlan, ...]
    """One or two, frontal first."""
    out: Path
    picture: Path
    model: Path | None
    """An exported cascade; None is the run's."""
    whole_detector: bool
    air_visible: bool
    preset: str | None
    distances_mm: tuple[float, float] | None
    """Source to detector and to isocentre; None with no preset is the trained geometry."""
    device: str
    seed: int
    steps: int | None
    relaxation: float | None
    """None chooses by the kind of the radiographs."""
    samples: int
    stage: str | None
    """The last one to sample; None is the finest that is trained."""


def add_sample_arguments(sample: argparse.ArgumentParser) -> None:
    """What `sample` takes besides the config."""
    sample.formatter_class = argparse.RawDescriptionHelpFormatter
    sample.description = DESCRIPTION
    sample.add_argument("--frontal", type=Path, metavar="FILE", help="PA radiograph")
    sample.add_argument(
        "--lateral", type=Path, metavar="FILE", help="lateral radiograph; one of the two may be left out"
    )
    sample.add_argument("--out", type=Path, required=True, metavar="FILE", help="volume to write, .nii.gz or .nii")
    sample.add_argument("--model", type=Path, metavar="FILE", help="exported cascade, in place of a run")

    image = sample.add_argument_group("the images")
    image.add_argument(
        "--intensity",
        nargs="+",
        choices=INTENSITY_NAMES,
        metavar="HOW",
        help=f"what gray values mean: {', '.join(INTENSITY_NAMES)} (linear: detector counts, dark where dense)",
    )
    size = image.add_mutually_exclusive_group()
    size.add_argument("--pixel-mm", nargs="+", type=positive, metavar="MM", help="edge of a pixel on the detector")
    size.add_argument("--whole-detector", action="store_true", help="the images show the whole square detector")
    image.add_argument("--calibrated", action="store_true", help="values are line integrals already: a = 1, b = 0")
    image.add_argument("--gain", nargs="+", type=positive, metavar="A", help="a, in place of a fitted one")
    image.add_argument("--offset", nargs="+", type=number, metavar="B", help="b, in place of a fitted one")
    image.add_argument("--air-visible", action="store_true", help="the beam passed beside the patient: p = 0 there")
    image.add_argument("--preset", choices=PRESET_NAMES, help="geometry of the radiographs (default: the trained one)")
    image.add_argument("--source-to-detector-mm", type=positive, metavar="MM", help="SDD of the radiographs")
    image.add_argument("--source-to-isocenter-mm", type=positive, metavar="MM", help="SOD of the radiographs")

    sampler = sample.add_argument_group("the sampler")
    sampler.add_argument("--stage", metavar="STAGE", help="the last one to sample (default: the finest)")
    sampler.add_argument("--steps", type=count, metavar="N", help="of each stage's sampler (default: the config's)")
    sampler.add_argument("--samples", type=count, default=1, metavar="N", help="average N volumes (1)")
    sampler.add_argument(
        "--relaxation",
        type=relaxation,
        metavar="R",
        help="how far the volume is pulled to the radiographs, 0 to 2 (1; 0.5 for DICOM and linear intensities)",
    )
    sampler.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (0)")
    sampler.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one"
    )


def sample_plan(parsed: argparse.Namespace) -> SamplePlan:
    """The plan on a parsed command line; everything that can be refused before anything is read is refused here.

    Raises:
        ConfigError: what is asked for contradicts itself, or cannot be written.
    """
    named = [(view, path) for view in ("frontal", "lateral") if (path := getattr(parsed, view)) is not None]
    if not named:
        raise ConfigError("expected a radiograph, found none: give --frontal FILE, --lateral FILE or both")
    if parsed.model is not None and (parsed.config is not None or parsed.overrides):
        raise ConfigError("--model brings its own config: leave --config and --set out")
    intensity, gain, offset = parsed.intensity, parsed.gain, parsed.offset
    if parsed.calibrated:
        if intensity or gain or offset or parsed.air_visible:
            raise ConfigError(
                "--calibrated says that the values are line integrals: leave --intensity, --gain, --offset and "
                "--air-visible out"
            )
        intensity, gain, offset = [CALIBRATED], [1.0], [0.0]
    if offset and parsed.air_visible:
        raise ConfigError("--offset and --air-visible both fix b: leave one of them out")
    columns = {"--intensity": intensity, "--pixel-mm": parsed.pixel_mm, "--gain": gain, "--offset": offset}
    spread = [_spread(option, given, len(named)) for option, given in columns.items()]
    views = tuple(ViewPlan(*start, *rest) for start, rest in zip(named, zip(*spread, strict=True), strict=True))
    return SamplePlan(
        views=views,
        out=parsed.out,
        picture=_picture_path(parsed.out, [path for _, path in named]),
        model=parsed.model,
        whole_detector=parsed.whole_detector,
        air_visible=parsed.air_visible,
        preset=parsed.preset,
        distances_mm=_distances(parsed),
        device=parsed.device,
        seed=parsed.seed,
        steps=parsed.steps,
        relaxation=parsed.relaxation,
        samples=parsed.samples,
        stage=parsed.stage,
    )


def _picture_path(out: Path, radiographs: list[Path]) -> Path:
    """The picture beside the volume, after both were found to be writable."""
    suffix = next((end for end in OUT_SUFFIXES if out.name.lower().endswith(end)), None)
    if suffix is None or out.name.lower() == suffix:
        raise ConfigError(f"--out {out}: expected a name that ends in .nii.gz or .nii, such as ct.nii.gz")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    picture = out.with_name(f"{out.name[: -len(suffix)]}.png")
    for target in (out, picture):
        if target.is_dir():
            raise ConfigError(f"--out {out}: {target} is a folder; choose another name")
        if any(target.resolve() == path.resolve() for path in radiographs):
            raise ConfigError(f"--out {out}: {target} would overwrite the radiograph; choose another name")
    return picture


def _distances(parsed: argparse.Namespace) -> tuple[float, float] | None:
    sdd, sod = parsed.source_to_detector_mm, parsed.source_to_isocenter_mm
    if sdd is None and sod is None:
        return None
    if sdd is None or sod is None:
        raise ConfigError("give both --source-to-detector-mm and --source-to-isocenter-mm, or neither")
    if parsed.preset is not None:
        raise ConfigError("--preset sets both distances: leave it out, or leave the distances out")
    if not sdd > sod:
        raise ConfigError(f"--source-to-detector-mm {sdd:g} must be larger than --source-to-isocenter-mm {sod:g}")
    return sdd, sod


def _spread(option: str, given: list[Value] | None, count: int) -> list[Value] | list[None]:
    """The value for each view."""
    if given is None:
        return [None] * count
    if len(given) not in (1, count):
        expected = "one value" if count == 1 else "one value for both images, or two"
        raise ConfigError(f"{option}: expected {expected}, found {len(given)}")
    return list(given) * (count if len(given) == 1 else 1)
