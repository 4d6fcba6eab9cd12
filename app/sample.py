"""`python -m app sample`: one or two radiographs in, a CT volume out, by a trained cascade.

Shapes: F edge of the config's finest stage, n of its first, N of the stage that is sampled last.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from app.config import Config, GeometryConfig
from app.data.calibration import Calibration, Known, calibrate
from app.data.nifti import write_nifti
from app.data.pooling import pool
from app.data.radiograph import CLEARLY_BETTER, align_view
from app.data.xray_files import Stated, read_xray
from app.data.xray_image import XrayImage, place
from app.errors import ConfigError, MachineError, Stopped
from app.ops.panels import sample_panel
from app.physics.geometry import PRESETS_MM, VIEWS, Geometry, geometry_from_config
from app.sample_plan import SamplePlan, ViewPlan
from app.train.inference import TrainedCascade, read_exported, read_run
from app.train.metrics import projection_error_percent
from app.train.precision import precision_for_use
from app.train.protocols import Stop
from app.train.sampling import SampledVolume, SamplerOptions, mean_projection, sample_cascade
from app.workspace import RunDir, atomic_write

log = logging.getLogger(__name__)

UNLIKE_TRAINING_PERCENT = 8.0
"""Projection error above which a volume does not explain the radiographs that it was made from."""
SAME_DISTANCE = 1e-3
STATED_DISTANCE = 0.01
"""Relative difference of a file's source-to-detector distance that is worth a word."""
REAL_RELAXATION = 0.5
WHOLE_PIXEL = 0.999

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class _Measured:
    """One radiograph as line integrals on the trained detector."""

    plan: ViewPlan
    image: XrayImage
    calibration: Calibration
    line_integrals: Floats
    """(F, F)."""
    covered: NDArray[np.bool_]
    """(F, F)."""


def sample(plan: SamplePlan, run_dir: RunDir | None, stop: Stop) -> str:
    """Make the volume and the picture of it.

    Args:
        plan: what is asked for.
        run_dir: the run whose cascade to use; None where the plan names an exported one.
        stop: polled before each sampler step.

    Returns:
        What was written, and how well it fits, for the terminal.

    Raises:
        DataError: a radiograph cannot be used.
        ConfigError: the geometry or the stage is wrong.
        CheckpointError: there is no trained cascade, or it is damaged.
        MachineError: no GPU where one is asked for, too little memory in it, or the files cannot be written.
        Stopped: asked to stop; nothing was written.
    """
    images = [_read(view, plan) for view in plan.views]
    cascade = _cascade(plan, run_dir)
    precision = precision_for_use(plan.device)
    torch.set_flush_denormal(True)
    trained = geometry_from_config(cascade.config)
    taken = _taken_geometry(plan, cascade.config, trained)
    _warn_of_perspective(images, trained, taken, stated=plan.preset is not None or plan.distances_mm is not None)
    mean = mean_projection(cascade)
    measured = [
        _measure(view, image, trained, taken, mean, cascade.config, plan)
        for view, image in zip(plan.views, images, strict=True)
    ]
    relaxation = _relaxation(plan, images)
    options = SamplerOptions(plan.seed, plan.steps, relaxation, plan.samples)
    xrays, shown = _both_views(measured)
    try:
        made = sample_cascade(cascade, xrays, shown, options, precision, stop)
    except torch.cuda.OutOfMemoryError as error:
        raise MachineError(
            f"the GPU has too little memory for {cascade.stages[-1].stage.name}: stop what else runs on it, end at an "
            "earlier stage (--stage), or use the CPU (--device cpu)"
        ) from error
    if stop():
        raise Stopped("stopped before the volume was written")
    errors, total = _projection_errors(made, measured)
    _write(plan, made, cascade, shown, total)
    lines = [_described(m, errors[m.plan.view]) for m in measured]
    voxel_mm = cascade.config.data.field_of_view_mm / made.hu.shape[0]
    lines.append(
        f"{plan.out}: {made.stage}, {made.hu.shape[0]}^3 voxels of {voxel_mm:.4g} mm, seed {plan.seed}, relaxation "
        f"{relaxation:g}, projection error {total:.1f} % (relative L2); picture in {plan.picture}"
    )
    if total > UNLIKE_TRAINING_PERCENT:
        log.warning(
            "UNLIKE TRAINING, do not trust the volume: its projections differ from the radiographs by %.1f %% "
            "(relative L2; above %.0f %% something does not fit). See the picture; check geometry, pixel size, "
            "intensity and orientation",
            total, UNLIKE_TRAINING_PERCENT,
        )  # fmt: skip
    return "\n".join(lines)


def _read(view: ViewPlan, plan: SamplePlan) -> XrayImage:
    return read_xray(view.path, view.view, Stated(view.intensity, view.pixel_mm, plan.whole_detector))


def _cascade(plan: SamplePlan, run_dir: RunDir | None) -> TrainedCascade:
    """The stages to sample."""
    if plan.model is not None:
        cascade = read_exported(plan.model)
    elif run_dir is not None:
        cascade = read_run(run_dir)
    else:
        raise ValueError("neither an exported cascade nor a run")
    names = [trained.stage.name for trained in cascade.stages]
    last = plan.stage or names[-1]
    if last not in names:
        raise ConfigError(f"--stage {last}: no such trained stage in {cascade.origin}; it has {', '.join(names)}")
    cascade = replace(cascade, stages=cascade.stages[: names.index(last) + 1])
    unfinished = [trained.stage.name for trained in cascade.stages if not trained.finished]
    if unfinished:
        log.warning("%s is not trained to its end: its best state so far is used", unfinished[-1])
    if plan.stage is None and len(names) < len(cascade.config.stages):
        log.warning("%s is the finest stage that is trained, of %d", last, len(cascade.config.stages))
    return cascade


def _taken_geometry(plan: SamplePlan, config: Config, trained: Geometry) -> Geometry:
    """How the radiographs were taken: as the command line says, else as those of the training."""
    distances = PRESETS_MM[plan.preset] if plan.preset is not None else plan.distances_mm
    if distances is None or _same_distances(distances, trained):
        return trained
    section = GeometryConfig(
        preset="custom", source_to_detector_mm=distances[0], source_to_isocenter_mm=distances[1], detector_mm=None
    )
    return geometry_from_config(config.model_copy(update={"geometry": section}))


def _same_distances(distances: tuple[float, float], geometry: Geometry) -> bool:
    own = (geometry.source_to_detector_mm, geometry.source_to_isocenter_mm)
    return all(abs(a - b) <= SAME_DISTANCE * b for a, b in zip(distances, own, strict=True))


def _warn_of_perspective(images: Sequence[XrayImage], trained: Geometry, taken: Geometry, stated: bool) -> None:
    if taken is not trained:
        # Magnification relative to the isocentre's at depth c is SOD / (SOD + c); the nearest plane is the worst.
        half = trained.field_of_view_mm / 2
        near = [sod / (sod - half) for sod in (taken.source_to_isocenter_mm, trained.source_to_isocenter_mm)]
        log.warning(
            "the radiographs were taken at SDD %g / SOD %g mm, the cascade was trained at %g / %g mm: the plane "
            "through the isocentre is scaled to fit, perspective differs (%.1f %% in size at the side of the source)",
            taken.source_to_detector_mm, taken.source_to_isocenter_mm, trained.source_to_detector_mm,
            trained.source_to_isocenter_mm, 100 * abs(near[0] / near[1] - 1),
        )  # fmt: skip
    for image in images:
        found = image.source_to_detector_mm
        if not stated and found is not None and abs(found / taken.source_to_detector_mm - 1) > STATED_DISTANCE:
            log.warning(
                "%s: says that it was taken at SDD %g mm, the cascade was trained at %g mm; give "
                "--source-to-detector-mm and --source-to-isocenter-mm",
                image.path, found, taken.source_to_detector_mm,
            )  # fmt: skip


def _measure(
    view: ViewPlan, image: XrayImage, trained: Geometry, taken: Geometry, mean: Floats, config: Config, plan: SamplePlan
) -> _Measured:
    """One radiograph, placed and calibrated against the projection (2, n, n) of the training mean."""
    finest = config.stages[-1].resolution
    placed = place(image, trained, taken, finest)
    factor = finest // mean.shape[-1]
    t = pool(placed.t, factor, 2)
    covered = _whole(placed.covered, factor)
    known = Known(view.gain, view.offset, plan.air_visible)
    calibration = calibrate(image.path, t, mean[VIEWS.index(view.view)], covered, known)
    alignment = align_view(view.view, {"": t}, mean)
    if alignment.turned_difference < CLEARLY_BETTER * alignment.fit.difference:
        log.warning(
            "%s: looks more like the training cases %s than as it is given (--%s): row 0 must be superior, column 0 "
            "the patient's right (frontal) or front (lateral)", image.path, alignment.turn, view.view,
        )  # fmt: skip
    return _Measured(view, image, calibration, calibration.line_integrals(placed.t), placed.covered)


def _whole(covered: NDArray[np.bool_], factor: int) -> NDArray[np.bool_]:
    """Which pixels of a coarser grid are covered in full."""
    return np.asarray(pool(covered.astype(np.float32), factor, 2) >= WHOLE_PIXEL)


def _relaxation(plan: SamplePlan, images: Sequence[XrayImage]) -> float:
    """Line integrals are trusted; detector counts and DICOM files are real radiographs, which fit less well."""
    if plan.relaxation is not None:
        return plan.relaxation
    real = any(image.is_dicom or image.reading in ("intensity", "inverted intensity") for image in images)
    return REAL_RELAXATION if real else 1.0


def _both_views(measured: Sequence[_Measured]) -> tuple[Floats, list[bool]]:
    """(2, F, F), zeros for a view that is not given, and which are."""
    given = {m.plan.view: m.line_integrals for m in measured}
    empty = np.zeros_like(measured[0].line_integrals)
    return np.stack([given.get(view, empty) for view in VIEWS]), [view in given for view in VIEWS]


def _projection_errors(made: SampledVolume, measured: Sequence[_Measured]) -> tuple[dict[str, float], float]:
    """100 |P mu - p| / |p| of each given view and of all, in %, where the images are."""
    mask = np.zeros_like(made.xrays)
    for m in measured:
        mask[VIEWS.index(m.plan.view)] = _whole(m.covered, len(m.covered) // made.xrays.shape[-1])
    drr, xrays = (torch.from_numpy(images * mask)[None] for images in (made.drr, made.xrays))
    own = {
        m.plan.view: projection_error_percent(drr[:, index, None], xrays[:, index, None]).item()
        for m in measured
        for index in [VIEWS.index(m.plan.view)]
    }
    return own, projection_error_percent(drr, xrays).item()


def _described(m: _Measured, error: float) -> str:
    a, b = m.calibration.gain, m.calibration.offset
    return (
        f"{m.plan.view}: {m.image.path}, {m.image.reading}, p = {a:.4g} t {'-' if b < 0 else '+'} {abs(b):.4g}, "
        f"projection error {error:.1f} %"
    )


def _write(
    plan: SamplePlan, made: SampledVolume, cascade: TrainedCascade, shown: Sequence[bool], percent: float
) -> None:
    title = f"{made.stage}, projection error {percent:.1f} %, seed {plan.seed} - research use, not for clinical use"
    picture = io.BytesIO()
    panel = sample_panel(title, made.xrays, made.drr, made.hu.astype(np.float32), shown)
    Image.fromarray(panel).save(picture, format="PNG")
    try:
        write_nifti(plan.out, made.hu, cascade.config.data.field_of_view_mm)
        atomic_write(plan.picture, picture.getvalue())
    except OSError as error:
        raise MachineError(f"{plan.out} cannot be written: {error.strerror or error}") from error
