"""From a cube of HU to the arrays of all stages: the finest is made, the coarser ones are averaged from it.

Shapes: N cube edge of a stage, F of the finest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.config import Config
from app.data.pooling import pool
from app.physics.attenuation import hu_to_mu
from app.physics.geometry import geometry_from_config
from app.physics.projector import Projector


def clip_hu(hu: NDArray[Any], window: tuple[float, float]) -> NDArray[np.int16]:
    """HU as stored: rounded, within the window."""
    return np.asarray(np.rint(np.clip(hu, *window)), dtype=np.int16)


def voxel_hash(cube: NDArray[np.int16]) -> str:
    """sha256 of a cube's voxels."""
    return hashlib.sha256(np.ascontiguousarray(cube).data).hexdigest()


class Renderer:
    """Radiographs of finest cubes by the run's own geometry."""

    def __init__(self, config: Config) -> None:
        self._geometry = geometry_from_config(config)
        self._edge = config.stages[-1].resolution

    @cached_property
    def _projector(self) -> Projector:
        return Projector(self._geometry, self._edge)

    def __call__(self, cube: NDArray[np.int16]) -> NDArray[np.float32]:
        """Line integrals (2, F, F) of a cube (F, F, F) in HU."""
        with torch.no_grad():
            mu = hu_to_mu(torch.from_numpy(cube).float())
            rendered: NDArray[np.float32] = self._projector(mu[None, None])[0].numpy()
        return rendered


def stage_arrays(
    cube: NDArray[np.int16], xrays: NDArray[np.float32], edges: Sequence[int]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """File names and arrays of each stage, from the finest cube (F, F, F) and its radiographs (2, F, F)."""
    finest = cube.shape[0]
    yield f"ct_{finest}.npy", cube
    yield f"xray_{finest}.npy", xrays.astype(np.float32)
    for edge in edges:
        if edge != finest:
            yield f"ct_{edge}.npy", np.rint(pool(cube.astype(np.float32), finest // edge, 3)).astype(np.int16)
            yield f"xray_{edge}.npy", pool(xrays.astype(np.float32), finest // edge, 2)
