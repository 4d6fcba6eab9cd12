"""The tags are the seed's, and each stands on one axis."""

import pytest

from app.tags import GLOBAL_AXIS, LOGGED_ON_RESUME, NO_AXIS, axis, is_axis, keep_before, names

SEED = """train_loss_step train_diffusion_step train_physics_step train_loss train_diffusion train_physics val_loss
val_diffusion val_physics epoch_time learning_rate"""


def test_names_are_those_of_the_seed() -> None:
    """A stage has the seed's eleven tags, each below the stage's name."""
    assert set(names("stage_64")) == {f"stage_64/{tag}" for tag in SEED.split()}


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("stage_64/train_loss_step", "stage_64/step"),
        ("stage_64/val_loss", "stage_64/epoch"),
        ("stage_64/pictures/3fa2", "stage_64/epoch"),
        ("perf/samples_per_s", GLOBAL_AXIS),
        ("gpu/0/power_w", GLOBAL_AXIS),
        ("host/cpu_percent", GLOBAL_AXIS),
        ("ops/restarts", GLOBAL_AXIS),
        ("config", NO_AXIS),
        ("stage_x/val_loss", NO_AXIS),
        ("performance/x", NO_AXIS),
    ],
)
def test_each_tag_stands_on_its_axis(tag: str, expected: str) -> None:
    """The table of the module holds."""
    assert axis(tag) == expected
    assert is_axis(expected) == (expected != NO_AXIS)


@pytest.mark.parametrize(
    ("tag", "kept"),
    [
        ("stage_16/train_loss_step", 10**9),
        ("stage_16/val_loss", 10**9),
        ("stage_32/train_loss_step", 70),
        ("stage_32/val_loss", 3),
        ("stage_32/pictures/3fa2", 3),
        ("perf/samples_per_s", 170),
        ("stage_64/train_loss_step", -1),
        ("stage_64/val_loss", -1),
        ("config", 10**9),
        ("stage_8/val_loss", 10**9),
    ],
)
def test_a_resume_in_the_second_stage_keeps_what_it_will_not_log_again(tag: str, kept: int) -> None:
    """Each axis is cut at its own number; earlier stages stay whole, later ones go whole."""
    keep = keep_before(("stage_16", "stage_32", "stage_64"), "stage_32", step=70, epochs=3, global_step=170)
    assert [keep(tag, number) for number in (kept, kept + 1)] == [True, kept == 10**9]


def test_what_a_resume_logs_is_logged_once_per_step() -> None:
    """A second resume at the same step replaces the first one's marker; other `ops/` points at that step stay."""
    expected = {"ops/interruptions", "ops/lost_steps", "ops/goodput", "ops/resumed", "ops/ledger"}
    assert set(LOGGED_ON_RESUME) == expected
    keep = keep_before(["stage_8"], "stage_8", step=7, epochs=1, global_step=7)
    assert not any(keep(tag, 7) for tag in LOGGED_ON_RESUME)
    assert all(keep(tag, 6) for tag in LOGGED_ON_RESUME)
    assert keep("ops/checkpoint_write_s", 7)
