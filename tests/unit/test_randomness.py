"""Randomness is a function of counters, and its distributions are those that the config asks for."""

import torch

from app.config import DiffusionConfig
from app.train.randomness import derive_seed, epoch_order, step_draws, volume_noise

CPU = torch.device("cpu")


def test_same_counters_same_noise_other_counters_other_noise() -> None:
    """Noise depends on its names and counters only, not on what was drawn before."""
    first = volume_noise((1, 4, 4, 4), CPU, 0, "stage_8", 5, 1)
    torch.randn(100)
    assert torch.equal(first, volume_noise((1, 4, 4, 4), CPU, 0, "stage_8", 5, 1))
    assert not torch.equal(first, volume_noise((1, 4, 4, 4), CPU, 0, "stage_8", 5, 2))


def test_seeds_do_not_depend_on_the_process() -> None:
    """A fixed value: another process, machine or Python must derive the same seed, or resumes change the curves."""
    assert derive_seed(0, "stage_64", 7) == 385869446734166943


def test_an_epoch_shows_every_case_before_any_case_twice() -> None:
    """13 samples of 5 cases: whole permutations, then a part of one."""
    order = epoch_order(5, 13, 0, "stage_8", 0)
    assert len(order) == 13
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert len(set(order[10:])) == 3
    assert order != epoch_order(5, 13, 0, "stage_8", 1)


def test_times_of_a_step_cover_the_schedule_evenly() -> None:
    """Stratified: sorted times of a batch of 8 are 1/8 apart."""
    t = step_draws(8, DiffusionConfig(), CPU, 0, "stage_8", 3).t.sort().values
    assert torch.allclose(t.diff(), torch.full((7,), 1 / 8), atol=1e-6)


def test_the_draws_of_a_step_are_fixed_values() -> None:
    """Like the seeds: no other library or order of operations may change what a resumed step draws."""
    config = DiffusionConfig(lowres_noise_max=0.1, view_dropout=0.3, lowres_real_share=0.5)
    draws = step_draws(3, config, CPU, 0, "stage_8", 3)
    assert draws.t.tolist() == [0.3125828504562378, 0.645916223526001, 0.9792495369911194]
    assert draws.views.tolist() == [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]
    assert draws.noise_level.tolist() == [0.04452754184603691, 0.03782057762145996, 0.0311175175011158]
    assert draws.real_lowres.tolist() == [1.0, 0.0, 1.0]
    assert draws[1:].views.tolist() == draws.views[1:].tolist()


def test_views_are_hidden_as_often_as_the_config_says_and_never_both() -> None:
    """10 % of the samples lack the frontal view, 10 % the lateral one, none lacks both."""
    views = torch.cat([step_draws(16, DiffusionConfig(view_dropout=0.1), CPU, step).views for step in range(500)])
    assert (views.sum(1) >= 1).all()
    assert torch.allclose(views.mean(0), torch.tensor([0.9, 0.9]), atol=0.015)
