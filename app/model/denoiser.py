"""The whole model of a stage: condition on two radiographs and a volume, predict x_0 = c + sigma_r F.

Shapes: B batch, N cube edge, n edge of the previous stage, M detector edge (= N). Volumes are x in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.config import Config, StageConfig
from app.model.backbone import HybridBackbone
from app.model.blocks import FourierEmbedding, coordinates
from app.model.xray_encoder import XrayEncoder
from app.physics.attenuation import mu_to_x, x_to_mu
from app.physics.geometry import VIEWS, geometry_from_config
from app.physics.projector import Projector
from app.physics.sart import sart

EMBEDDING_WIDTH = 256
XRAY_SCALE = 4.0
"""Line integrals of a thorax reach 8; the network sees p / XRAY_SCALE - 1. Fixed: an image keeps its absolute scale."""


@dataclass(frozen=True)
class Condition:
    """What the network knows of a sample beside x_t."""

    volume: Tensor
    """c: (B, 1, N, N, N), the data-consistent prior or the noised, upsampled volume of the previous stage."""
    noise_level: Tensor
    """s: (B,), standard deviation of the noise that was added to the low-resolution volume."""
    rays: Tensor
    """(B, 4, N, N, N), zero where a view is hidden: both radiographs unprojected along their rays, then what they say
    is wrong with `volume`, x per voxel over sigma_r: the first step of SART from each view."""
    lifted: Tensor
    """(B, C, G, G, G), features of both radiographs unprojected onto the token grid."""
    views: Tensor
    """(B, 2), 1 where a view is shown."""


class StageModel(nn.Module):
    """A self-contained stage of the cascade; its state_dict holds the training mean and the residual scale too."""

    mean: Tensor
    residual_scale: Tensor
    coordinates: Tensor

    def __init__(self, config: Config, stage: StageConfig) -> None:
        """The first stage of `config` builds its conditioning volume itself, later stages are given one."""
        super().__init__()
        self.stage = stage
        self.diffusion = config.diffusion
        self.hu_window = config.data.hu_window
        self.is_first = stage == config.stages[0]
        edge, backbone = stage.resolution, stage.backbone
        geometry = geometry_from_config(config)
        self.token_edge = edge // backbone.patch // 2 ** len(backbone.widths)
        self.projector = Projector(geometry, edge)
        self.lifter = Projector(geometry, self.token_edge)
        self.encoder = XrayEncoder(edge, self.token_edge, backbone.xray_widths)
        self.embed = FourierEmbedding(4, EMBEDDING_WIDTH)
        self.backbone = HybridBackbone(
            backbone,
            edge,
            in_channels=9,
            token_features=len(VIEWS) * backbone.xray_widths[-1],
            embedding=EMBEDDING_WIDTH,
        )
        self.register_buffer("mean", torch.zeros(1, 1, edge, edge, edge))
        self.register_buffer("residual_scale", torch.ones(()))
        self.register_buffer(
            "coordinates", coordinates((edge, edge, edge), torch.device("cpu"))[None], persistent=False
        )

    def condition(
        self,
        xrays: Tensor,
        views: Tensor,
        lowres: Tensor | None = None,
        noise_level: Tensor | None = None,
        lowres_noise: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Condition:
        """Gather what is known of a sample.

        Args:
            xrays: (B, 2, M, M) line integrals, frontal and lateral.
            views: (B, 2), 1 where a view may be used.
            lowres: (B, 1, n, n, n) the previous stage's volume; None for the first stage.
            noise_level: (B,) s of the noise augmentation (Ho et al. 2021, arXiv 2106.15282); None is 0.
            lowres_noise: (B, 1, n, n, n) standard normal; needed where `noise_level` is given.
            seen: (B, 2, M, M), what the network sees in place of `xrays`, c being right: to measure its use of them.
        """
        if noise_level is None:
            noise_level = xrays.new_zeros(xrays.shape[0])
        elif lowres is not None and lowres_noise is not None:
            lowres = lowres + noise_level[:, None, None, None, None] * lowres_noise
        volume = self._prior(xrays, views) if lowres is None else self._upsample(lowres)
        shown = xrays if seen is None else seen
        with torch.no_grad():
            rays = [self._unproject(shown, views, view) for view in range(len(VIEWS))]
            rays += [self._missing(volume, noise_level, shown, views, view) for view in range(len(VIEWS))]
        lifted = [
            self.lifter.unproject(self.encoder(self._scaled(shown, view), view).float(), VIEWS[view])
            * views[:, view, None, None, None, None]
            for view in range(len(VIEWS))
        ]
        return Condition(volume, noise_level, torch.cat(rays, dim=1), torch.cat(lifted, dim=1), views)

    def forward(self, x_t: Tensor, log_snr_t: Tensor, condition: Condition) -> Tensor:
        """x_t: (B, 1, N, N, N); log_snr_t: (B,) -> x_0 = c + sigma_r F(x_t, c, X-rays): (B, 1, N, N, N), fp32.

        sigma_r^2 is the mean square of x_0 - c over the training cases, plus the variance of the added noise.
        """
        scalars = torch.cat([log_snr_t[:, None] / 10.0, condition.noise_level[:, None], condition.views], dim=1)
        inputs = torch.cat(
            [x_t, condition.volume, condition.rays, self.coordinates.expand(x_t.shape[0], -1, -1, -1, -1)], dim=1
        )
        residual: Tensor = self.backbone(inputs, condition.lifted, self.embed(scalars)).float()
        return condition.volume + self._sigma_r(condition.noise_level) * residual

    def data_consistent(
        self, x_0: Tensor, xrays: Tensor, views: Tensor, sweeps: int, relaxation: float = 1.0
    ) -> Tensor:
        """`sweeps` SART sweeps on x_0: (B, 1, N, N, N) towards the radiographs, in attenuation."""
        if sweeps == 0:
            return x_0
        mu = sart(x_to_mu(x_0, self.hu_window), xrays, self.projector, sweeps, relaxation, views)
        return mu_to_x(mu, self.hu_window).clamp(-1.0, 1.0)

    @torch.no_grad()
    def _prior(self, xrays: Tensor, views: Tensor) -> Tensor:
        mean = self.mean.expand(xrays.shape[0], -1, -1, -1, -1)
        return self.data_consistent(mean, xrays, views, self.stage.prior_sweeps)

    def _upsample(self, lowres: Tensor) -> Tensor:
        return F.interpolate(lowres, size=self.mean.shape[2:], mode="trilinear", align_corners=False)

    def _scaled(self, xrays: Tensor, view: int) -> Tensor:
        return xrays[:, view : view + 1] / XRAY_SCALE - 1.0

    def _unproject(self, xrays: Tensor, views: Tensor, view: int) -> Tensor:
        lifted = self.projector.unproject(xrays[:, view : view + 1], VIEWS[view])
        return (lifted / XRAY_SCALE - 1.0) * views[:, view, None, None, None, None]

    def _missing(self, volume: Tensor, noise_level: Tensor, xrays: Tensor, views: Tensor, view: int) -> Tensor:
        """A^T((p - A c) / (A 1)) / (A^T 1) of one view, as x over sigma_r: (B, 1, N, N, N)."""
        mu = x_to_mu(volume.float(), self.hu_window)
        inverse_rows, inverse_columns = self.projector.inverse_sums(VIEWS[view])
        residual = (xrays[:, view] - self.projector.project(mu, VIEWS[view])) * inverse_rows
        step = self.projector.backproject(residual, VIEWS[view]) * inverse_columns
        change = mu_to_x(mu + step, self.hu_window) - volume
        return change / self._sigma_r(noise_level) * views[:, view, None, None, None, None]

    def _sigma_r(self, noise_level: Tensor) -> Tensor:
        """(B,) -> (B, 1, 1, 1, 1)."""
        return (self.residual_scale**2 + noise_level**2).sqrt()[:, None, None, None, None]


def build_model(config: dict[str, Any], stage_name: str) -> StageModel:
    """The model of a stage from a checkpoint's own `config`.

    Raises:
        pydantic.ValidationError: the dict does not pass the strict schema.
    """
    parsed = Config.model_validate(config)
    return StageModel(parsed, parsed.stage(stage_name))
