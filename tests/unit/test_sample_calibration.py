"""Gain and offset of radiographs: fitted robustly, or as given."""

from pathlib import Path

import numpy as np
import pytest

from app.data.calibration import Known, calibrate
from app.errors import DataError

PATH = Path("x.png")
ALL = np.ones((32, 32), bool)
rows, columns = np.mgrid[:32, :32] - 15.5
MEAN = np.maximum(0, 6 - 0.4 * np.hypot(rows, columns)).astype(np.float32)
"""A cone of line integrals in air: 0 beyond 15 pixels from the centre."""
T = ((MEAN + 0.8) / 2.5).astype(np.float32)
"""Its reading: p = 2.5 t - 0.8."""


def test_what_differs_from_the_mean_counts_little():
    """A fifth of the pixels is off by two line integrals: least squares misses the gain by a quarter, this does not."""
    t = T.copy()
    t[::5] += np.where(columns[::5] % 2 < 1, 0.8, -0.8)
    assert np.polyfit(t.ravel(), MEAN.ravel(), 1)[0] < 0.75 * 2.5
    found = calibrate(PATH, t, MEAN, ALL, Known())
    assert found.gain == pytest.approx(2.5, rel=1e-3)
    assert found.offset == pytest.approx(-0.8, abs=2e-3)


def test_only_covered_pixels_count():
    """The others are the border of the image going on."""
    t, covered = T.copy(), ALL.copy()
    t[:, :20], covered[:, :20] = 77, False
    assert calibrate(PATH, t, MEAN, covered, Known()).gain == pytest.approx(2.5, rel=1e-4)


def test_what_is_known_is_kept_and_the_rest_fitted():
    """A gain, an offset, both."""
    assert calibrate(PATH, T, MEAN, ALL, Known(gain=2.5)).offset == pytest.approx(-0.8, abs=1e-4)
    assert calibrate(PATH, T, MEAN, ALL, Known(offset=-0.8)).gain == pytest.approx(2.5, rel=1e-4)
    both = calibrate(PATH, T, -MEAN, ALL, Known(1.0, 0.0))
    assert (both.gain, both.offset) == (1.0, 0.0)
    np.testing.assert_array_equal(both.line_integrals(T), T)


def test_air_beside_the_patient_fixes_the_offset():
    """The patient is half as thick again as the mean: the fit of both is wrong, the air is right."""
    thick = 1.5 * MEAN
    t = (thick + 0.8) / 2.5
    found = calibrate(PATH, t.astype(np.float32), MEAN, ALL, Known(gain=2.5, air=True))
    np.testing.assert_allclose(found.line_integrals(t), thick, atol=1e-4)
    assert found.offset == pytest.approx(-0.8, abs=1e-4)


def test_the_wrong_polarity_is_refused():
    """A negative gain is no gain."""
    with pytest.raises(DataError) as caught:
        calibrate(PATH, -T, MEAN, ALL, Known())
    assert str(caught.value) == (
        "x.png: expected values that rise with the attenuation, found that they fall (fitted gain -2.5); give the "
        "other polarity by --intensity, and see that the image is upright and of the view that it is given as"
    )


def test_line_integrals_are_not_negative():
    """Noise below zero is air."""
    found = calibrate(PATH, T, MEAN, ALL, Known(1.0, -1.0))
    assert found.line_integrals(T).min() == 0
