"""The numbers of one synthetic thorax: sizes, places, tissues and findings, drawn from a random generator.

Lengths are in mm in the patient's frame (x to the left, y posterior, z superior; origin mid-chest), values in HU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from app.data.phantom_canvas import Pose

SIDES = (-1, 1)
"""Signs of x: right and left."""


@dataclass(frozen=True)
class Patient:
    """One synthetic patient; pairs are (right, left)."""

    pose: Pose
    half_width: float
    half_depth: float
    squareness: float
    fat: float
    muscle: float
    apex_z: float
    dome_z: tuple[float, float]
    dome_drop: float
    lung_hu: tuple[float, float]
    lung_gradient: float
    mediastinum_half: float
    mediastinum_hu: float
    heart: tuple[float, float, float]
    heart_centre: tuple[float, float, float]
    blood_hu: float
    aorta_radius: float
    soft_hu: float
    fat_hu: float
    liver_hu: float
    spine_depth: float
    kyphosis: float
    scoliosis: float
    vertebra_pitch: float
    vertebra_half: tuple[float, float]
    bone_hu: float
    rib_pitch: float
    rib_slope: float
    rib_half: float
    ribs: int
    breast: float
    shoulders: float
    stomach_gas: float
    vessel_scale: tuple[float, float]
    nodules: int
    mass: float
    effusion: tuple[float, float]
    texture_hu: float

    def inner(self) -> tuple[float, float]:
        """Half-axes (x, y) of the thoracic cage at its widest, in mm."""
        wall = self.fat + self.muscle
        return self.half_width - wall, self.half_depth - 0.8 * wall

    def spine_at(self, z: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Centre (x, y) of the vertebral body at height z, in mm."""
        bend = np.square(np.asarray(z, np.float32) / np.float32(150.0))
        x = self.scoliosis * np.sin(np.asarray(z, np.float32) * np.float32(0.016))
        return np.float32(1.0) * x, np.float32(self.spine_depth) - np.float32(self.kyphosis) * bend


def draw_patient(rng: np.random.Generator) -> Patient:
    """A random patient; body sizes follow one scale so that big patients are big throughout."""
    u = rng.uniform
    scale = float(u(0.84, 1.1))
    degrees = np.pi / 180
    pose = Pose(
        (float(u(-14, 14)), float(u(-12, 12)), float(u(-22, 22))),
        float(u(-6, 6)) * degrees,
        float(np.tan(u(-4, 4) * degrees)),
        float(np.tan(u(-6, 6) * degrees)),
    )
    fat = float(7 + 26 * rng.beta(1.4, 2.6))
    depth = float(u(100, 118)) * scale + 0.8 * fat
    width = float(u(144, 162)) * scale + fat
    big_heart = float(u(1.15, 1.35)) if u() < 0.15 else 1.0
    heart_size = float(u(0.88, 1.1)) * scale * big_heart
    dome = float(u(-105, -55)) * scale
    lung = float(u(-890, -760))
    effused = int(rng.integers(0, 2)) if u() < 0.15 else -1
    pruned = int(rng.integers(0, 2)) if u() < 0.12 else -1
    vessels = float(u(0.8, 1.2))
    return Patient(
        pose=pose,
        half_width=width,
        half_depth=depth,
        squareness=float(u(0.35, 0.75)),
        fat=fat,
        muscle=float(u(13, 20)) * scale,
        apex_z=float(u(118, 142)) * scale,
        dome_z=(dome, dome - float(u(4, 22))),
        dome_drop=float(u(38, 62)) * scale,
        lung_hu=(lung + float(u(-25, 25)), lung + float(u(-25, 25))),
        lung_gradient=float(u(20, 110)),
        mediastinum_half=float(u(22, 30)) * scale,
        mediastinum_hu=float(u(-50, 40)),
        heart=(69.0 * heart_size, float(u(44, 52)) * heart_size, float(u(46, 54)) * heart_size),
        heart_centre=(float(u(16, 34)) * scale, float(u(-0.42, -0.28)), float(u(28, 42)) * scale),
        blood_hu=float(u(30, 60)) if u() < 0.6 else float(u(90, 260)),
        aorta_radius=float(u(10.5, 15.5)) * scale,
        soft_hu=float(u(35, 65)),
        fat_hu=float(u(-115, -85)),
        liver_hu=float(u(35, 110)),
        spine_depth=depth - fat - float(u(58, 66)) * scale,
        kyphosis=float(u(-4, 22)),
        scoliosis=float(u(-7, 7)),
        vertebra_pitch=float(u(22, 27)) * scale,
        vertebra_half=(float(u(15, 19)) * scale, float(u(13, 16)) * scale),
        bone_hu=float(u(130, 320)),
        rib_pitch=float(u(22, 27)) * scale,
        rib_slope=float(u(0.3, 0.6)),
        rib_half=float(u(5.0, 7.0)) * scale,
        ribs=int(rng.integers(10, 13)),
        breast=float(u(0.5, 1.0)) if u() < 0.5 else 0.0,
        shoulders=float(u(0.6, 1.0)),
        stomach_gas=float(u(0.0, 1.0)),
        vessel_scale=(vessels * (0.45 if pruned == 0 else 1.0), vessels * (0.45 if pruned == 1 else 1.0)),
        nodules=int(rng.integers(0, 5)),
        mass=float(u(14, 32)) if u() < 0.12 else 0.0,
        effusion=(float(u(20, 75)) if effused == 0 else 0.0, float(u(20, 75)) if effused == 1 else 0.0),
        texture_hu=float(u(4, 12)),
    )
