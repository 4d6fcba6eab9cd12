"""How much arithmetic a training step is, in closed form, and how much of it the card could do.

A FLOP is one addition or one multiplication. Counted are the layers with a matrix, attention and the projections;
norms, activations and noise are left out, as is usual (Kaplan et al. 2020, arXiv 2001.08361), and so is what is done
again because of `checkpoint_activations`: MFU (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) is of the work that
the model needs, not of the work that the card does. Augmentation of the cases is no part of it either.

Shapes: N cube edge, G edge of the finest grid of the backbone, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from app.config import Config, StageConfig
from app.model.denoiser import StageModel
from app.physics.geometry import VIEWS

TERA = 1e12
FORWARD_AND_BACKWARD = 3
"""A layer's gradients, to its input and to its weights, cost what its forward pass costs each."""
Layer = nn.Linear | nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d

PEAK_TFLOP_PER_S = {
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.5,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.5,
    "A100": 312.0,
    "A40": 149.7,
    "L40S": 362.05,
    "L40": 181.05,
    "L4": 121.0,
    "RTX 6000 Ada": 364.25,
    "RTX A6000": 154.8,
    "RTX A5000": 111.1,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "V100-PCIE": 112.0,
    "V100": 125.0,
}
"""Dense tensor-core TFLOP/s in bf16 or fp16 with fp32 sums, by words of the card's name; sparsity counts twice in most
data sheets and not here. Sources: NVIDIA's data sheets of B200 (HGX, per GPU), H200, H100, A100, A40, L40S, L40, L4,
RTX 6000 Ada, RTX A6000, RTX A5000 and V100; for the GeForce cards, whose fp32 sums run at half the printed rate, the
tables of NVIDIA's Ada GPU architecture (RTX 4090) and Ampere GA102 (RTX 3090) white papers. V100 has fp16 alone."""
SLOWER_OR_FASTER = {"Ti", "SUPER", "D", "Laptop", "Max-Q", "MIG"}
"""Words that make another card, or a part of one, of the name before them."""


def training_tflop(model: StageModel) -> float:
    """TFLOP of forward and backward of one training sample."""
    layers = sum(cost * (FORWARD_AND_BACKWARD - is_first) for cost, is_first in _layers(model))
    attention = FORWARD_AND_BACKWARD * _attention(model)
    return (layers + attention + _projections(model)) / TERA


def step_tflop(config: Config, stage: StageConfig) -> float:
    """TFLOP of an optimizer step of `stage`, from shapes alone."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        return stage.batch * training_tflop(StageModel(config, stage))


def peak_tflop_per_s(device: torch.device, precision: str) -> float | None:
    """Of a card in bf16 or fp16; None for a CPU, an unknown card, and fp32, which cuDNN may or may not do as TF32."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_by_name(torch.cuda.get_device_name(device))


def peak_by_name(card: str) -> float | None:
    """The peak of a card by its name, such as `NVIDIA H100 80GB HBM3`; None where the table lacks it."""
    if SLOWER_OR_FASTER & set(card.split()):
        return None
    words = f" {card} ".replace("-", " ")
    return next((peak for name, peak in PEAK_TFLOP_PER_S.items() if f" {name} ".replace("-", " ") in words), None)


def _layers(model: StageModel) -> Iterator[tuple[float, bool]]:
    """FLOP of each layer's forward pass of a sample, and whether it is a first one, whose input wants no gradient."""
    first: list[nn.Module] = [model.backbone.stem, model.encoder.stem, model.embed.mlp[0]]
    for layer, positions in (*_grids(model), *_grid(model.embed, 1), *_tokens(model), *_encoder(model)):
        yield 2.0 * layer.weight.numel() * positions, layer in first


def _grids(model: StageModel) -> Iterator[tuple[Layer, int]]:
    """The backbone's convolutions, and at how many positions each works for a sample."""
    backbone = model.backbone
    edges = [model.stage.resolution // backbone.patch // 2**level for level in range(len(backbone.down) + 1)]
    yield from _grid(backbone.stem, edges[0])
    yield from _grid(backbone.head, edges[0])
    yield from _grid(backbone.lift, edges[-1])
    for levels in (backbone.levels_down, backbone.levels_up):
        for level, edge in zip(levels, edges[:-1], strict=True):
            yield from _grid(level, edge)
    # A convolution with a stride costs by its output, a transposed one by its input: the coarser grid, both times.
    for between in (backbone.down, backbone.up):
        for convolution, edge in zip(between, edges[1:], strict=True):
            yield from _grid(convolution, edge)


def _grid(module: nn.Module, edge: int) -> Iterator[tuple[Layer, int]]:
    """The same for a module on a grid of `edge`^3, whose linear layers work once."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            yield layer, 1
        elif isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            yield layer, edge**3


def _tokens(model: StageModel) -> Iterator[tuple[Layer, int]]:
    """The same for the transformer: the modulation is made once, all else for each token."""
    for block in model.backbone.vit:
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear):
                yield layer, 1 if name == "modulation" else model.token_edge**3


def _encoder(model: StageModel) -> Iterator[tuple[Layer, int]]:
    """The same for the X-ray encoder, which sees each view."""
    encoder = model.encoder
    edges = [model.token_edge * 2**level for level in reversed(range(len(encoder.blocks)))]
    yield encoder.stem, len(VIEWS) * edges[0] ** 2
    for modules, sides in ((encoder.blocks, edges), (encoder.down, edges[1:])):
        for module, edge in zip(modules, sides, strict=True):
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    yield layer, len(VIEWS) * edge**2


def _attention(model: StageModel) -> float:
    """Q K^T and its product with V: 4 T^2 width in each block."""
    backbone = model.stage.backbone
    return 4.0 * float(model.token_edge) ** 6 * backbone.vit_width * backbone.vit_depth


def _projections(model: StageModel) -> float:
    """Of the conditioning volume, the X-ray inputs, the lifted features and the physics loss, backward included.

    Projecting, its transpose and unprojecting a channel are two products each: 4 n^4 on a cube and a detector of n.
    """
    cube, tokens = 4.0 * float(model.stage.resolution) ** 4, 4.0 * float(model.token_edge) ** 4
    prior = 2 * model.stage.prior_sweeps if model.is_first else 0
    # Without gradients: the prior's sweeps; an unprojection and the first step of SART from each view.
    given = prior + 1 + 2
    lifted = 2 * model.stage.backbone.xray_widths[-1]
    loss = 2
    return len(VIEWS) * ((given + loss) * cube + lifted * tokens)
