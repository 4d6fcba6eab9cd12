"""Cone-beam geometry of the two views, in mm, around the isocentre (the centre of the cube).

Patient frame: x to the patient's left, y posterior, z superior. A view's depth c grows along the beam, from the
source towards the detector; a point at depth c is magnified by SDD / (SOD + c).

    view      source              depth c   image axes (v, u)
    frontal   posterior, y = SOD  -y        (z, x)             a PA radiograph
    lateral   right, x = -SOD     +x        (z, y)             left side at the detector
"""

from __future__ import annotations

from dataclasses import dataclass

from app.config import Config
from app.errors import ConfigError

VIEWS = ("frontal", "lateral")

PRESETS_MM = {"chest_stand": (1800.0, 1500.0), "c_arm": (1020.0, 850.0), "luna16": (1200.0, 800.0)}
"""Source-to-detector and source-to-isocentre distance (SDD, SOD) of each preset."""

DETECTOR_MARGIN = 1.1
"""Edge of the default detector over the shadow of the cube's central plane."""


@dataclass(frozen=True)
class Geometry:
    """Distances of both views; a square detector, centred on the beam and perpendicular to it.

    The source must lie outside the cube. The detector may lie inside (C-arms stand that close): rays are then taken to
    the far side of the cube all the same, so that both views see all of it.
    """

    source_to_detector_mm: float
    source_to_isocenter_mm: float
    field_of_view_mm: float
    detector_mm: float

    def __post_init__(self) -> None:
        half = self.field_of_view_mm / 2
        if self.source_to_isocenter_mm <= half:
            raise ConfigError(
                f"geometry: the X-ray source lies inside the cube: source_to_isocenter_mm is "
                f"{self.source_to_isocenter_mm:g}, half of field_of_view_mm is {half:g}; "
                "move the source away or make the field of view smaller"
            )

    @property
    def magnification(self) -> float:
        """Of the plane through the isocentre: SDD / SOD."""
        return self.source_to_detector_mm / self.source_to_isocenter_mm


def geometry_from_config(config: Config) -> Geometry:
    """The geometry that `config.geometry` and the field of view describe."""
    section, field_of_view_mm = config.geometry, config.data.field_of_view_mm
    if section.source_to_detector_mm is not None and section.source_to_isocenter_mm is not None:
        sdd, sod = section.source_to_detector_mm, section.source_to_isocenter_mm
    else:
        sdd, sod = PRESETS_MM[section.preset]
    detector_mm = section.detector_mm or DETECTOR_MARGIN * field_of_view_mm * sdd / sod
    return Geometry(sdd, sod, field_of_view_mm, detector_mm)
