"""The names of everything that is logged, and the axis on which each name stands.

A tag stands on exactly one axis, and a step number means nothing without it:

| tag                                  | axis             | step number                                             |
|--------------------------------------|------------------|---------------------------------------------------------|
| `{stage}/..._step`                   | `{stage}/step`   | optimizer steps of the stage, the first one is 1        |
| any other `{stage}/...`              | `{stage}/epoch`  | completed epochs of the stage, 0 before the first ends  |
| `perf/`, `gpu/`, `host/`, `ops/...`  | `global_step`    | optimizer steps over all stages                         |
| anything else (`config`, the layout) | `NO_AXIS`        | free; such a point is never taken back                  |

The trainer logs by this table and `keep_before` rewinds by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import fmean

STEP_TAGS = ("train_loss_step", "train_diffusion_step", "train_physics_step")
"""Logged every `log_every_n_steps`: the values of that step's batch."""
EPOCH_TAGS = (
    "train_loss",
    "train_diffusion",
    "train_physics",
    "val_loss",
    "val_diffusion",
    "val_physics",
    "epoch_time",
    "learning_rate",
)
"""Logged after each epoch."""
PHYSICS_WEIGHT = "physics_weight"
VAL_PSNR = "val_psnr_db"
VAL_GAIN = "val_gain_over_c_db"
VAL_XRAY_USE = "val_xray_use_db"
VAL_PROJECTION_ERROR = "val_projection_error"
"""In %. All four are of sampled volumes, and stand at completed epochs."""
BEST = {"val_loss": min, VAL_PSNR: max}
"""What counts as a run's best at Weights & Biases: the lowest or the highest value after an epoch of training."""
ALARM = "alarm"
"""A text at each epoch after which the network was found to do nothing for its volume or with its X-rays."""
CONFIG = "config"
INTERRUPTIONS = "ops/interruptions"
"""How often the run went on after an end that was not its own, at the step where it went on."""
LOST_STEPS = "ops/lost_steps"
"""Steps done in vain up to there: completed, not saved, done again."""
GOODPUT = "ops/goodput"
"""Share of the time since the first start that went into steps that count; at each resume and each stage's end."""
RESUMED = "ops/resumed"
"""A text at each step where the run went on."""
LEDGER = "ops/ledger"
"""A table of all attempts so far, at each step where the run went on."""
COST = "ops/cost_usd"
"""Of all attempts so far, from the start of their processes. No price, no point; alike the next two."""
COST_PER_EPOCH = "ops/cost_per_epoch_usd"
"""Of an epoch of the stage under way, at the pace of this attempt."""
COST_AT_END = "ops/cost_at_end_usd"
"""Of the whole run at that pace; later stages by their arithmetic."""
CHECKPOINT_TAGS = (
    "ops/checkpoint_blocked_s",
    "ops/checkpoint_write_s",
    "ops/checkpoint_mib_per_s",
    "ops/checkpoint_interval_s",
    "ops/checkpoint_overhead",
    "ops/checkpoint_failures",
)
"""Of the newest save: seconds that training waited, seconds of the write, its speed; then the interval between two
rolling saves and the share of the time that they cost at it; saves that failed so far."""
STEP_TIME = "perf/step_time_s"
SAMPLES_PER_S = "perf/samples_per_s"
DATA_WAIT = "perf/data_wait"
"""Share of the steps' time in which the training thread of the first process waited for samples."""
TFLOP_PER_S = "perf/tflop_per_s"
"""Arithmetic that the model needed, forward and backward, over all processes."""
MFU = "perf/mfu"
"""That as a share of the cards' dense peak; only for cards whose peak is known."""


def newest(values: Sequence[float]) -> float:
    """The last one."""
    return values[-1]


GPU_FIGURES: dict[str, Callable[[Sequence[float]], float]] = {
    "utilization_percent": fmean,
    "memory_gib": max,
    "power_w": fmean,
    "temperature_c": max,
    "throttled": fmean,
    "uncorrected_errors": newest,
}
"""`gpu/{number}/...`, and how the readings since the last point become one: a mean, the worst, or the newest."""
HOST_FIGURES: dict[str, Callable[[Sequence[float]], float]] = {
    "cpu_percent": fmean,
    "ram_gib": max,
    "trainer_ram_gib": max,
    "shm_free_gib": min,
    "container_cpu_cores": fmean,
    "container_cpu_limit_cores": newest,
    "container_ram_gib": max,
    "container_ram_limit_gib": newest,
    "disk_free_gib": newest,
    "disk_needed_gib": newest,
    "disk_full_in_h": newest,
}
"""`host/...`, alike."""
LOGGED_ON_RESUME = (INTERRUPTIONS, LOST_STEPS, GOODPUT, RESUMED, LEDGER)
GLOBAL_GROUPS = ("perf", "gpu", "host", "ops")

GLOBAL_AXIS = "global_step"
NO_AXIS = ""
STAGE_TAG = re.compile(r"(?P<stage>stage_\d+)/.+")
AXIS_OF_STAGE = re.compile(r"stage_\d+/(step|epoch)")


def names(stage: str) -> tuple[str, ...]:
    """The tags that every run has for `stage`, such as `stage_64/val_loss`."""
    return tuple(f"{stage}/{tag}" for tag in (*STEP_TAGS, *EPOCH_TAGS))


def step_axis(stage: str) -> str:
    """The axis of the stage's optimizer steps."""
    return f"{stage}/step"


def epoch_axis(stage: str) -> str:
    """The axis of the stage's completed epochs."""
    return f"{stage}/epoch"


def best_name(tag: str) -> str:
    """The name of the best value of `tag`, such as `stage_64/best_val_loss`."""
    stage, _, name = tag.partition("/")
    return f"{stage}/best_{name}"


def axis(tag: str) -> str:
    """The axis of `tag` by the table above, or NO_AXIS."""
    if match := STAGE_TAG.fullmatch(tag):
        return step_axis(match["stage"]) if tag.endswith("_step") else epoch_axis(match["stage"])
    return GLOBAL_AXIS if tag.partition("/")[0] in GLOBAL_GROUPS else NO_AXIS


def is_axis(name: str) -> bool:
    """Whether `name` is the name of an axis."""
    return name == GLOBAL_AXIS or AXIS_OF_STAGE.fullmatch(name) is not None


def keep_before(
    stages: Sequence[str], stage: str, *, step: int, epochs: int, global_step: int
) -> Callable[[str, int], bool]:
    """Which points a run keeps that resumes in `stage`: those that it will not log again.

    Args:
        stages: names of all stages in the order of training.
        stage: the stage that goes on.
        step: its completed optimizer steps; points up to this one stay.
        epochs: its completed epochs, validation included; points up to this one stay.
        global_step: completed optimizer steps over all stages.

    Returns:
        A function of (tag, step number). Points of earlier stages stay, those of later ones go; a stage that is not
        in `stages` keeps its points, because nothing will replace them. What each resume logs goes at this very step.
    """
    later = stages[stages.index(stage) + 1 :]
    last = {step_axis(stage): step, epoch_axis(stage): epochs, GLOBAL_AXIS: global_step}
    last.update({name: -1 for other in later for name in (step_axis(other), epoch_axis(other))})

    def keep(tag: str, number: int) -> bool:
        limit = last.get(axis(tag))
        if limit is not None and tag in LOGGED_ON_RESUME:
            limit -= 1
        return limit is None or number <= limit

    return keep
