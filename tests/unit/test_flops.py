"""The closed form of a step's arithmetic against torch's own counter, and the peaks against names that cards have."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from app.model.denoiser import StageModel
from app.train.flops import peak_by_name, peak_tflop_per_s, training_tflop
from app.train.loss import sample_losses
from tests.conftest import tiny_config

LARGER = (
    "stages.stage_16.backbone.widths=[8, 16]",
    "stages.stage_16.backbone.blocks=2",
    "stages.stage_16.backbone.vit_depth=3",
    "stages.stage_16.backbone.xray_widths=[8, 16, 24]",
    "stages.stage_8.prior_sweeps=3",
)


@pytest.mark.parametrize(
    ("name", "overrides"), [("stage_8", ()), ("stage_8", LARGER), ("stage_16", ()), ("stage_16", LARGER)]
)
@pytest.mark.parametrize("samples", [1, 2])
def test_the_closed_form_is_what_torch_counts(name: str, overrides: tuple[str, ...], samples: int) -> None:
    """Every product of a real forward and backward pass, with attention as two products; to the last FLOP."""
    config = tiny_config(*overrides)
    model = StageModel(config, config.stage(name))
    edge = model.stage.resolution
    x, ones = torch.rand(samples, 1, edge, edge, edge), torch.ones(samples)
    xrays, views = torch.rand(samples, 2, edge, edge), torch.ones(samples, 2)
    lowres = None if model.is_first else torch.zeros(samples, 1, edge // 2, edge // 2, edge // 2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = sample_losses(model, x, x, ones, model.condition(xrays, views, lowres, ones, lowres), xrays)
        (losses.diffusion + losses.physics).mean().backward()
    assert training_tflop(model) * 1e12 * samples == pytest.approx(counter.get_total_flops(), rel=1e-12)


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A40", 149.7),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.25),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-PCIE-16GB", 112.0),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A4000", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_a_card_is_known_by_its_name(card: str, peak: float | None) -> None:
    """Names as drivers give them; a relative or a slice of a known card is unknown."""
    assert peak_by_name(card) == peak


def test_a_cpu_has_no_peak() -> None:
    """So there is no MFU."""
    assert peak_tflop_per_s(torch.device("cpu"), "fp32") is None
