"""What the model of a stage must do before it has learned anything, and what its output must depend on."""

import pytest
import torch

from app.config import BackboneConfig
from app.model.blocks import depth_to_space, sincos_positions, space_to_depth
from app.model.denoiser import StageModel, build_model
from app.model.diffusion import log_snr
from app.physics.attenuation import mu_to_x, x_to_mu
from app.physics.sart import sart
from app.train.loss import diffusion_loss, physics_loss
from tests.conftest import tiny_config


def small_model(stage: int) -> StageModel:
    """A stage of the tiny cascade with fixed weights."""
    torch.manual_seed(0)
    config = tiny_config()
    return StageModel(config, config.stages[stage])


def inputs(model: StageModel, batch: int = 2) -> dict[str, torch.Tensor]:
    """Noise, radiographs and, behind the first stage, a low-resolution volume."""
    source = torch.Generator().manual_seed(1)
    edge = model.stage.resolution
    values = {
        "x_t": torch.randn((batch, 1, edge, edge, edge), generator=source),
        "xrays": torch.rand((batch, 2, edge, edge), generator=source) * 4,
    }
    if not model.is_first:
        values["lowres"] = torch.randn((batch, 1, edge // 2, edge // 2, edge // 2), generator=source) * 0.3
    return values


def predict(model: StageModel, values: dict[str, torch.Tensor], views: torch.Tensor | None = None) -> torch.Tensor:
    """x_0 at log SNR 0."""
    views = torch.ones(len(values["x_t"]), 2) if views is None else views
    condition = model.condition(values["xrays"], views, values.get("lowres"))
    return model(values["x_t"], torch.zeros(len(values["x_t"])), condition)


@pytest.fixture(params=[1, 2])
def awake(request: pytest.FixtureRequest) -> StageModel:
    """A later stage whose zero layers were filled, as if it had been trained."""
    model = small_model(request.param)
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_untrained_model_returns_its_conditioning_volume(stage: int) -> None:
    """x_0 = c + sigma_r F with F = 0 at the start."""
    model = small_model(stage)
    values = inputs(model)
    given = model.condition(values["xrays"], torch.ones(2, 2), values.get("lowres")).volume
    assert torch.equal(predict(model, values), given)


def test_the_first_prior_explains_the_radiographs_better_than_the_mean() -> None:
    """c of the first stage is the training mean after SART: its projection error is smaller than the mean's."""
    model = small_model(0)
    model.stage = model.stage.model_copy(update={"prior_sweeps": 4})
    model.mean.fill_(-0.6)
    truth = torch.full_like(model.mean, -0.95)
    truth[..., 2:6, 2:5, 1:6] = -0.2
    xrays = model.projector(x_to_mu(truth, model.hu_window))
    prior = model.condition(xrays, torch.ones(1, 2)).volume

    def error(x: torch.Tensor) -> float:
        return (model.projector(x_to_mu(x, model.hu_window)) - xrays).square().mean().item()

    assert error(prior) < 0.1 * error(model.mean)


@pytest.mark.parametrize("view", [0, 1])
def test_the_network_is_told_what_a_view_says_is_wrong_with_c(view: int) -> None:
    """Times sigma_r it is the first step that `sart` makes from that view alone; 0 where c is true."""
    model = small_model(1)
    model.residual_scale.fill_(0.25)
    source = torch.Generator().manual_seed(2)
    lowres, truth = torch.rand(1, 1, 8, 8, 8, generator=source) * 0.2, torch.rand(1, 1, 16, 16, 16, generator=source)
    xrays = model.projector(x_to_mu(truth * 0.2, model.hu_window))
    condition = model.condition(xrays, torch.ones(1, 2), lowres)
    alone = torch.zeros(1, 2)
    alone[0, view] = 1
    corrected = sart(x_to_mu(condition.volume, model.hu_window), xrays, model.projector, 1, view_mask=alone)
    assert corrected.min() > 0
    expected = mu_to_x(corrected, model.hu_window) - condition.volume
    assert torch.allclose(condition.rays[:, [2 + view]] * 0.25, expected, atol=1e-5)
    true = model.projector(x_to_mu(condition.volume, model.hu_window))
    assert model.condition(true, torch.ones(1, 2), lowres).rays[:, 2:].abs().max() < 1e-4


def test_seen_x_rays_leave_c_alone() -> None:
    """Of the first stage too, whose c is made from the X-rays: what differs is what the network is told of them."""
    for stage in (0, 1):
        model = small_model(stage)
        values = inputs(model)
        other = values["xrays"].flip(0)
        right = model.condition(values["xrays"], torch.ones(2, 2), values.get("lowres"))
        wrong = model.condition(values["xrays"], torch.ones(2, 2), values.get("lowres"), seen=other)
        assert torch.equal(wrong.volume, right.volume)
        assert torch.equal(wrong.rays[:, :2], right.rays[:, :2].flip(0))
        assert not torch.equal(wrong.rays[:, 2:], right.rays[:, 2:])
        assert torch.equal(wrong.lifted, right.lifted.flip(0))


@pytest.mark.parametrize("name", ["x_t", "xrays", "lowres"])
def test_output_depends_on_every_input(awake: StageModel, name: str) -> None:
    """The gradient with respect to x_t, to both X-rays and to the previous stage is not zero."""
    values = inputs(awake)
    values[name].requires_grad_()
    predict(awake, values).square().sum().backward()
    gradient = values[name].grad
    assert gradient is not None
    per_view = gradient.abs().sum((0, 2, 3)) if name == "xrays" else gradient.abs().sum()[None]
    assert (per_view > 0).all()


def test_swapping_the_views_changes_the_output(awake: StageModel) -> None:
    """The two radiographs are not interchangeable."""
    values = inputs(awake)
    swapped = {**values, "xrays": values["xrays"].flip(1)}
    assert (predict(awake, values) - predict(awake, swapped)).abs().max() > 1e-3


def test_a_hidden_view_cannot_be_seen(awake: StageModel) -> None:
    """With the lateral view hidden its pixels do not matter, and that it is hidden does."""
    values = inputs(awake)
    views = torch.tensor([[1.0, 0.0]]).expand(2, 2)
    hidden = predict(awake, values, views)
    values["xrays"][:, 1] += 1
    assert torch.equal(hidden, predict(awake, values, views))
    assert not torch.equal(hidden, predict(awake, values))


def test_a_sample_does_not_depend_on_its_neighbours_in_the_batch(awake: StageModel) -> None:
    """The first of two samples comes out as it does alone."""
    values = inputs(awake)
    alone = predict(awake, {name: value[:1] for name, value in values.items()})
    assert torch.allclose(predict(awake, values)[:1], alone, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients(awake: StageModel) -> None:
    """`checkpoint_activations` trades time for memory and changes no value."""
    values = inputs(awake)
    gradients = []
    for checkpointed in (False, True):
        awake.backbone.checkpointed = checkpointed
        awake.zero_grad()
        predict(awake, values).square().sum().backward()
        gradients.append([p.grad.clone() for p in awake.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_state_dict_alone_rebuilds_the_model() -> None:
    """Mean and residual scale travel with the weights; projector matrices, which follow from the config, do not."""
    model = small_model(0)
    model.mean.uniform_(-1, 1)
    state = model.state_dict()
    rebuilt = build_model(tiny_config().model_dump(mode="json"), "stage_8")
    rebuilt.load_state_dict(state)
    assert torch.equal(rebuilt.mean, model.mean)
    assert not any("projector" in name or "lifter" in name for name in state)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_space_to_depth_is_a_permutation(patch: int) -> None:
    """depth_to_space undoes it, and each channel block is one patch."""
    x = torch.arange(8**3, dtype=torch.float32).reshape(1, 1, 8, 8, 8)
    folded = space_to_depth(x, patch)
    assert torch.equal(depth_to_space(folded, patch), x)
    assert torch.equal(folded[0, :, 0, 0, 0], x[0, 0, :patch, :patch, :patch].flatten())


def test_every_token_has_a_position_of_its_own() -> None:
    """No two of 4 x 4 x 4 position codes are equal."""
    codes = sincos_positions((4, 4, 4), 32)
    assert len(torch.unique(codes, dim=0)) == 64


def test_xray_encoder_levels_must_fit_the_token_grid() -> None:
    """A config whose X-ray encoder halves more often than the grid allows is refused with both numbers."""
    with pytest.raises(ValueError, match=r"can halve at most 1 times before it reaches the token grid"):
        tiny_config().stages[0].model_validate(
            {
                "resolution": 8,
                "backbone": BackboneConfig(patch=1, widths=(8,), xray_widths=(8, 8, 8)),
            }
        )


def test_physics_loss_is_the_relative_squared_projection_error() -> None:
    """A volume whose attenuation is 10 % too high everywhere has 0.1^2, and 0 where log SNR <= 0."""
    model = small_model(0)
    low, high = model.hu_window
    truth = torch.full((2, 1, 8, 8, 8), 2 * (0.0 - low) / (high - low) - 1)  # 0 HU: water
    tenth = 2 * (100.0 - low) / (high - low) - 1  # 100 HU attenuates a tenth more than water
    xrays = model.projector(x_to_mu(truth, model.hu_window))
    values = physics_loss(model, torch.full_like(truth, tenth), xrays, torch.ones(2, 2), torch.tensor([1.0, -1.0]))
    assert values.tolist() == pytest.approx([0.01, 0.0], rel=1e-4)


def test_diffusion_loss_is_the_weighted_mean_square() -> None:
    """An error of 0.1 everywhere at SNR 1 costs 2 * 0.01."""
    x_0 = torch.zeros(1, 1, 4, 4, 4)
    assert diffusion_loss(x_0, x_0 + 0.1, torch.tensor([0.0]), 5.0).item() == pytest.approx(0.02)


def test_log_snr_of_a_real_stage_reaches_both_ends() -> None:
    """The shifted schedule of the coarsest and finest stage still begins clean and ends in noise."""
    config = tiny_config().diffusion
    for edge in (16, 256):
        ends = log_snr(torch.tensor([0.0, 1.0]), edge, config)
        assert ends.tolist() == [config.log_snr_max, config.log_snr_min]
