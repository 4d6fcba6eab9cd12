"""The geometry that a config describes."""

from __future__ import annotations

import pytest

from app.config import Config, DataConfig, GeometryConfig
from app.errors import ConfigError
from app.physics.geometry import PRESETS_MM, Geometry, geometry_from_config


@pytest.mark.parametrize(
    ("preset", "sdd", "sod"), [("chest_stand", 1800, 1500), ("c_arm", 1020, 850), ("luna16", 1200, 800)]
)
def test_presets_are_the_published_distances(preset: str, sdd: float, sod: float) -> None:
    """Each preset that the config offers has its source-to-detector and source-to-isocentre distance."""
    geometry = geometry_from_config(Config(geometry=GeometryConfig.model_validate({"preset": preset})))
    assert (geometry.source_to_detector_mm, geometry.source_to_isocenter_mm) == (sdd, sod)


def test_every_preset_of_the_config_is_known() -> None:
    """The schema and this table list the same presets, `custom` aside."""
    choices = GeometryConfig.model_fields["preset"].annotation.__args__  # type: ignore[union-attr]
    assert {*PRESETS_MM, "custom"} == set(choices)


def test_custom_distances_and_detector_are_taken_as_given() -> None:
    """`preset: custom` uses the three lengths of the config."""
    section = GeometryConfig(
        preset="custom", source_to_detector_mm=1500.0, source_to_isocenter_mm=1000.0, detector_mm=430.0
    )
    config = Config(data=DataConfig(field_of_view_mm=300.0), geometry=section)
    assert geometry_from_config(config) == Geometry(1500.0, 1000.0, 300.0, 430.0)


def test_the_default_detector_covers_the_central_plane_and_ten_percent() -> None:
    """Without `detector_mm` the detector is the magnified field of view plus 10 %."""
    geometry = geometry_from_config(Config(data=DataConfig(field_of_view_mm=400.0)))
    assert geometry.detector_mm == pytest.approx(400.0 * 1800 / 1500 * 1.1)


@pytest.mark.parametrize("sod", [100.0, 192.0])
def test_a_source_inside_the_cube_is_refused(sod: float) -> None:
    """A source inside the field of view, or on its face, is a configuration error that gives both lengths."""
    section = GeometryConfig(preset="custom", source_to_detector_mm=1000.0, source_to_isocenter_mm=sod)
    with pytest.raises(ConfigError) as error:
        geometry_from_config(Config(geometry=section))
    assert str(error.value) == (
        f"geometry: the X-ray source lies inside the cube: source_to_isocenter_mm is {sod:g}, half of field_of_view_mm "
        "is 192; move the source away or make the field of view smaller"
    )


def test_a_detector_inside_the_cube_is_allowed() -> None:
    """A C-arm's detector stands 170 mm from the isocentre, nearer than the faces of a 384 mm cube."""
    geometry = geometry_from_config(Config(geometry=GeometryConfig(preset="c_arm")))
    detector_side_mm = geometry.source_to_detector_mm - geometry.source_to_isocenter_mm
    assert detector_side_mm < geometry.field_of_view_mm / 2
