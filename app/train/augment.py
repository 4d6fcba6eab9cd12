"""Augmentation of training cases: the patient is moved, and the radiographs are those of the moved patient.

One rigid motion with a scale moves the CT cube, the radiographs are rendered anew from the moved cube, and the previous
stage's own output is moved alike. A given radiograph cannot be moved with the patient, because what a ray has passed is
not known from the image: whatever `prepare` took from files is replaced by the projection of the moved cube. It is
rendered from the stage's own voxels, while `prepare` renders from the finest and averages: at a coarse stage the
radiographs of moved cases fit their voxels exactly, and those of unmoved cases differ from that by some per cent. Moved
or not, the radiographs that the network sees may then be measured with a wrong gain and with noise; the physics loss
compares with the line integrals before that, so that it does not teach the wrong ones.

Every draw is a function of (seed, stage, step, sample), as in `app.train.randomness`, and of nothing else.
Shapes: B batch, N cube edge, n edge of the previous stage. Points are (x, y, z) in mm from the centre of the cube.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from app.config import AugmentationConfig, Config
from app.model.denoiser import StageModel
from app.physics.attenuation import x_to_mu
from app.train.randomness import generator, volume_noise
from app.train.samples import Batch

SampleName = tuple[int, str, int, int]
"""(seed, stage, step, number of the sample in the whole batch): what the draws of a sample are a function of."""

NOISE_LIMIT = 8.0
"""Line integral above which the noise grows no more: a thorax reaches it, and behind metal exp(p / 2) has no end."""


@dataclass(frozen=True)
class Draws:
    """What happens to each sample; float64 on the CPU."""

    linear: Tensor
    """(B, 3, 3) rotation times scale."""
    shift_mm: Tensor
    """(B, 3); a point moves from q to linear q + shift."""
    gain: Tensor
    """(B, 2) factor on the line integrals of each view."""


def augment(batch: Batch, model: StageModel, config: Config, names: Sequence[SampleName]) -> tuple[Batch, Tensor]:
    """The batch with its patients moved, and the radiographs as measured, (B, 2, N, N), for the network.

    Args:
        batch: as loaded; it comes back as it is where nothing moves.
        model: renders the radiographs.
        config: of the run.
        names: of the samples in the batch.
    """
    section = config.augmentation
    if not (section.moves or section.distorts):
        return batch, batch.xrays
    draws = augmentation_draws(section, names)
    if section.moves:
        batch = _moved(batch, model, draws, config.data.field_of_view_mm)
    if not section.distorts:
        return batch, batch.xrays
    # Photons per pixel grow with its area: a coarser stage sees the mean of several pixels of the finest.
    share = model.stage.resolution / config.stages[-1].resolution
    return batch, measured(batch.xrays, draws.gain, section.xray_noise * share, names)


def augmentation_draws(config: AugmentationConfig, names: Sequence[SampleName]) -> Draws:
    """Draw for each sample by its name; a setting does not change what the others draw."""
    linear, shifts, gains = [], [], []
    for name in names:
        source = generator(torch.device("cpu"), *name, "augment")
        axis = torch.randn(3, generator=source, dtype=torch.float64)
        uniform = torch.rand(7, generator=source, dtype=torch.float64) * 2 - 1
        turn = rotation(axis, math.radians(config.rotation_deg) * uniform[0].item())
        linear.append(turn * (1 + config.scale * uniform[1]))
        shifts.append(config.translation_mm * uniform[2:5])
        gains.append(1 + config.xray_gain * uniform[5:7])
    return Draws(torch.stack(linear), torch.stack(shifts), torch.stack(gains))


def rotation(axis: Tensor, angle: float) -> Tensor:
    """(3, 3) R = I + sin(a) K + (1 - cos(a)) K^2 about `axis` (3,), K v = axis x v / |axis| (Rodrigues)."""
    x, y, z = (axis / axis.norm()).tolist()
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


@torch.no_grad()
def moved_volume(x: Tensor, linear: Tensor, shift_mm: Tensor, field_of_view_mm: float) -> Tensor:
    """Move cubes (B, 1, N, N, N) in [-1, 1] of any N so that what is at q comes to linear q + shift.

    Trilinear, so that a moved cube is a little smoother than a still one; from outside the cube comes air.
    """
    back = torch.linalg.inv(linear)
    # grid_sample asks where each voxel comes from, in half edges of the cube, in the order x, y, z.
    offset = -(back @ shift_mm[:, :, None]) / (field_of_view_mm / 2)
    theta = torch.cat([back, offset], dim=2).to(x.device, x.dtype)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1


@torch.no_grad()
def measured(xrays: Tensor, gain: Tensor, noise: float, names: Sequence[SampleName]) -> Tensor:
    """Line integrals (B, 2, N, N) as a detector would give them: quantum noise, then a wrong gain g (B, 2).

    Photons N ~ Poisson(I_0 exp(-p)) are the noise model of Zeng et al. 2015 (IEEE TNS 62(5), doi
    10.1109/TNS.2015.2467219) without its electronic part. To first order -log(N / I_0) then has the variance
    exp(p) / I_0, so that p <- g (p + `noise` exp(p / 2) eps) with noise = I_0^(-1/2) in a pixel of `xrays`.
    """
    if noise > 0:
        eps = torch.stack([volume_noise(xrays.shape[1:], xrays.device, *name, "xray noise") for name in names])
        xrays = xrays + noise * (xrays.clamp(0, NOISE_LIMIT) / 2).exp() * eps
    return xrays * gain[:, :, None, None].to(xrays.device, xrays.dtype)


@torch.no_grad()
def _moved(batch: Batch, model: StageModel, draws: Draws, field_of_view_mm: float) -> Batch:
    x_0 = moved_volume(batch.x_0, draws.linear, draws.shift_mm, field_of_view_mm)
    lowres = batch.lowres
    if lowres is not None:
        lowres = moved_volume(lowres, draws.linear, draws.shift_mm, field_of_view_mm)
    return Batch(x_0, model.projector(x_to_mu(x_0, model.hu_window)), lowres)
