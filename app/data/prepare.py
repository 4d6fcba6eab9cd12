"""`prepare`: from scans or phantoms to the cache, resumable after every case."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

from app.config import Config
from app.data import phantom
from app.data.build import Renderer, clip_hu, stage_arrays, voxel_hash
from app.data.cache import Cache, CaseRecord, Outcome
from app.data.prepare_ct import CtPreparation
from app.data.report import Entry, PrepareReport
from app.data.watch import Watch
from app.workspace import Workspace

logger = logging.getLogger(__name__)


def never() -> bool:
    """Nobody asks to stop."""
    return False


def prepare(
    config: Config, workspace: Workspace, *, stop: Callable[[], bool] = never, progress: bool = True
) -> PrepareReport:
    """Bring every usable case of the config's source into the cache; what is there already is not read again.

    Args:
        config: says the source, the cube and the limits.
        workspace: holds data and cache.
        stop: polled between files.
        progress: a bar where stderr is a terminal; log lines come in any case.

    Raises:
        NothingUsable: no usable case; the message lists the reasons.
        Stopped: `stop` said so; finished cases stay.
    """
    workspace.ensure()
    cache = Cache(workspace.cache, config)
    cache.recover()
    watch = Watch(stop, progress)
    try:
        if config.data.source == "phantoms":
            entries = _prepare_phantoms(config, cache, watch)
        else:
            entries = CtPreparation(config, workspace, cache).run(watch)
    finally:
        cache.save_index()
    report = PrepareReport(tuple(entries))
    logger.info("data: %s", report.summary())
    return report


def _prepare_phantoms(config: Config, cache: Cache, watch: Watch) -> list[Entry]:
    render = Renderer(config)
    count = config.data.phantoms.count
    entries = []
    for index in watch.over(range(count), "phantom"):
        source = f"phantom:{config.data.phantoms.seed}:{index}"
        content = hashlib.sha256(f"{source}:{phantom.REVISION}".encode()).hexdigest()
        known = cache.holds(_case_id(content))
        if not known:
            _add_phantom(config, cache, render, index, source, content)
            logger.info("prepared phantom %d of %d", index + 1, count)
        entries.append(Entry(_case_id(content), source, cache.index.cases[_case_id(content)], fresh=not known))
    return entries


def _case_id(content: str) -> str:
    """Phantoms have no name to hide: their ids are the same in every workspace."""
    return f"c{content[:12]}"


def _add_phantom(config: Config, cache: Cache, render: Renderer, index: int, source: str, content: str) -> None:
    edge, fov = cache.edges[-1], config.data.field_of_view_mm
    cube = clip_hu(phantom.phantom_hu(config.data.phantoms.seed, index, edge, fov), config.data.hu_window)
    record = CaseRecord(
        id=_case_id(content),
        patient=f"phantom-{index}",
        content=content,
        voxels=voxel_hash(cube),
        source=source,
        size=f"{edge}x{edge}x{edge}, {fov / edge:g} mm",
        coverage=None,
        lung_fraction=None,
        drr_difference=None,
    )
    cache.write(record, Outcome((0, 0), case=record.id), "", stage_arrays(cube, render(cube), cache.edges))
