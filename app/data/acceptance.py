"""The limits of the config under which a prepared case is used."""

from __future__ import annotations

from app.config import Config
from app.data.cache import CaseRecord


def limits_key(config: Config) -> str:
    """Names the limits, so that a refusal under other ones is looked at again."""
    data = config.data
    return f"{data.min_coverage:g} {data.min_lung_fraction:g} {data.max_drr_difference:g} {data.max_file_gib:g}"


def refusal_by_limits(record: CaseRecord, config: Config) -> str | None:
    """Why a case may not be used, or None."""
    return (
        coverage_refusal(record.coverage, config)
        or lung_refusal(record.lung_fraction, config)
        or drr_refusal(record.drr_difference, config)
    )


def coverage_refusal(coverage: float | None, config: Config) -> str | None:
    """Why a scan that covers this share of the cube is too short, or None."""
    data = config.data
    if coverage is None or coverage >= data.min_coverage:
        return None
    return (
        f"the scan covers {coverage:.0%} of the field of view of {data.field_of_view_mm:g} mm, "
        f"at least {data.min_coverage:.0%} is needed (data.min_coverage)"
    )


def lung_refusal(lung_fraction: float | None, config: Config) -> str | None:
    """Why a body with this share of lung is no thorax, or None."""
    if lung_fraction is None or lung_fraction >= config.data.min_lung_fraction:
        return None
    return (
        f"not a thorax: lungs fill {lung_fraction:.1%} of the body, "
        f"at least {config.data.min_lung_fraction:.1%} is needed (data.min_lung_fraction)"
    )


def drr_refusal(difference: float | None, config: Config) -> str | None:
    """Why radiographs that differ this much from the scan's own are not of it, or None."""
    if difference is None or difference <= config.data.max_drr_difference:
        return None
    return (
        f"misaligned radiographs: they differ from the scan's own projection by {difference:.3f} (relative L2 after "
        f"the best gain and offset), at most {config.data.max_drr_difference:g} is allowed (data.max_drr_difference)"
    )
