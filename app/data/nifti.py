"""A cube in patient axes as a NIfTI file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from app.workspace import atomic_write

NIFTI_SUFFIXES = (".nii", ".nii.gz")


def write_nifti(path: Path, hu: np.ndarray[Any, np.dtype[np.int16]], field_of_view_mm: float) -> None:
    """Write a cube (N, N, N) in HU, axes (z, y, x) in LPS, whole or not at all; the isocentre becomes the origin.

    SimpleITK thinks in LPS; the affine in the file is NIfTI's, in RAS, so that its first two rows are negated.

    Raises:
        OSError: the file cannot be written.
    """
    edge = hu.shape[0]
    voxel_mm = field_of_view_mm / edge
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing([voxel_mm] * 3)
    image.SetOrigin([-voxel_mm * (edge - 1) / 2] * 3)
    suffix = next(end for end in reversed(NIFTI_SUFFIXES) if path.name.lower().endswith(end))
    # SimpleITK writes to a path alone, with the suffix that says how.
    with tempfile.TemporaryDirectory(prefix="hybrid-vit-cascade-") as folder:
        scratch = Path(folder) / f"ct{suffix}"
        try:
            sitk.WriteImage(image, str(scratch))
        except RuntimeError as error:
            raise OSError(f"no room in {folder} for the volume before it is moved to {path}") from error
        atomic_write(path, scratch.read_bytes())
