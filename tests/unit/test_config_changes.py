"""Claims about what may change between two attempts of a run, and the text of the refusal of what may not."""

from pathlib import Path

import pytest

from app.config import Config
from app.config_changes import differences, refusal
from app.config_file import config_as_dict, load_config
from app.env import Environment

ROOT = Path(__file__).parents[2]
ENV = Environment.read({})


def _changed(**changes):
    return Config().model_copy(update=changes)


def test_equal_configs_have_no_differences():
    """A config survives the way through a checkpoint."""
    assert differences(config_as_dict(Config()), Config(), Path("a.pt")) == ([], [])


def test_differences_are_told_apart():
    """A seed is scientific, a cadence is operational; the precision is taken from the checkpoint."""
    new = _changed(
        seed=3,
        run_name="b",
        logging=Config().logging.model_copy(update={"log_every_n_steps": 7}),
        compute=Config().compute.model_copy(update={"precision": "fp32", "workers": 4}),
    )
    scientific, operational = differences(config_as_dict(Config()), new, Path("a.pt"))
    assert [str(item) for item in scientific] == ["seed: 0 -> 3"]
    assert [item.key for item in operational] == [
        "run_name",
        "logging.log_every_n_steps",
        "compute.precision",
        "compute.workers",
    ]


@pytest.mark.parametrize(
    ("schedule", "physics", "epochs", "may"),
    [
        ("constant", 0.0, 101, True),
        ("constant", 0.0, 99, False),
        ("constant", 0.02, 101, False),
        ("cosine", 0.0, 101, False),
    ],
)
def test_a_stage_may_grow_only_where_no_schedule_knows_its_length(schedule, physics, epochs, may):
    """With a cosine or a physics ramp, more epochs would change the steps already taken."""
    optimizer = Config().optimizer.model_copy(update={"schedule": schedule})
    old = _changed(optimizer=optimizer, physics=Config().physics.model_copy(update={"weight": physics}))
    first, *others = old.stages
    new = old.model_copy(update={"stages": (first.model_copy(update={"epochs": epochs}), *others)})
    scientific, operational = differences(config_as_dict(old), new, Path("a.pt"))
    assert [item.key for item in (operational if may else scientific)] == ["stages.stage_64.epochs"]


def test_a_changed_list_of_stages_is_one_difference():
    """Not one for each key of the stage that came or went."""
    scientific, operational = differences(config_as_dict(Config()), _changed(stages=Config().stages[:2]), Path("a.pt"))
    assert [str(item) for item in scientific] == [
        'stages: ["stage_64", "stage_128", "stage_256"] -> ["stage_64", "stage_128"]'
    ]
    assert operational == []


def test_a_checkpoint_from_before_augmentation_is_no_other_run():
    """Its config lacks the section, which was off; turning it on is another run."""
    old = config_as_dict(Config())
    del old["augmentation"]
    assert differences(old, Config(), Path("a.pt")) == ([], [])
    augmented = _changed(augmentation=Config().augmentation.model_copy(update={"rotation_deg": 10.0}))
    scientific, operational = differences(old, augmented, Path("a.pt"))
    assert [str(item) for item in scientific] == ["augmentation.rotation_deg: 0.0 -> 10.0"]
    assert operational == []


def test_the_refusal_is_a_table_with_the_way_out():
    """Each setting with both values, and what to do."""
    scientific, _ = differences(config_as_dict(Config()), _changed(seed=3), Path("a.pt"))
    assert refusal(scientific) == (
        "this run was started with other scientific settings, and its curves would not continue:\n"
        "  setting  in the checkpoint  now\n"
        "  seed     0                  3\n"
        "put the old values back, or start a new run with another run_name (RUN_NAME=...)"
    )


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("no_prior", ["stages.stage_16.prior_sweeps"]),
        ("physics_off", ["physics.weight"]),
        ("physics_constant", ["physics.ramp_start", "physics.ramp_end"]),
        ("no_lowres_noise", ["diffusion.lowres_noise_max"]),
    ],
)
def test_an_ablation_is_one_setting_away_from_the_demo(name, changed):
    """Beside the name of its run; their baseline is the demo without its finest stage."""
    folder = ROOT / "configs/ablations"
    demo = load_config(ROOT / "configs/demo.yaml", [], ENV)
    baseline = load_config(folder / "baseline.yaml", [], ENV)
    assert baseline == demo.model_copy(update={"stages": demo.stages[:2], "run_name": "ablation-baseline"})
    ablation = load_config(folder / f"{name}.yaml", [], ENV)
    scientific, operational = differences(config_as_dict(baseline), ablation, Path("a.pt"))
    assert [item.key for item in scientific] == changed
    assert [item.key for item in operational] == ["run_name"]
