"""A whole run of the tiny cascade in real processes, and what a user does with it afterwards."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.tags import names
from tests.conftest import ROOT
from tests.runs import RUN, command, load, refused, series, train

STAGES = ("stage_8", "stage_16", "stage_32")
CONFIG = ("--config", "tests/tiny.yaml")
EPOCHS = {"stage_8": 3, "stage_16": 2, "stage_32": 2}
STEPS_PER_EPOCH = 4


@pytest.fixture(scope="module")
def workspace(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a finished run."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("run") / "workspace")


def copy_of(workspace: Path, tmp_path: Path) -> Path:
    """A workspace of its own, for tests that change it."""
    return shutil.copytree(workspace, tmp_path / "copy")


def test_every_tag_of_the_seed_is_there_with_every_step_once(workspace: Path) -> None:
    """Per-step tags at each step from 1, per-epoch tags at each completed epoch from 1; validation also before them."""
    curves = series(workspace / RUN)
    for stage in STAGES:
        epochs = list(range(1, EPOCHS[stage] + 1))
        for tag in names(stage):
            steps = [step for step, _ in curves[tag]]
            if tag.endswith("_step"):
                assert steps == list(range(1, EPOCHS[stage] * STEPS_PER_EPOCH + 1)), tag
            else:
                assert steps == ([0, *epochs] if "/val_" in tag else epochs), tag


def test_without_a_price_there_are_no_cost_curves(workspace: Path) -> None:
    """Nor a line in the status."""
    assert [tag for tag in series(workspace / RUN) if "usd" in tag] == []
    assert "USD" not in command(workspace, "status", *CONFIG).stdout


@pytest.mark.parametrize("side", ["train", "val"])
def test_logged_losses_add_up(workspace: Path, side: str) -> None:
    """loss = diffusion + physics_weight * physics; validation uses the final weight throughout."""
    curves = series(workspace / RUN)
    for stage in STAGES:
        weights = dict(curves[f"{stage}/physics_weight"])
        rows = zip(*(curves[f"{stage}/{side}_{part}"] for part in ("loss", "diffusion", "physics")), strict=True)
        for (epoch, loss), (_, diffusion), (_, physics) in rows:
            weight = weights[epoch] if side == "train" else 0.02
            assert loss == pytest.approx(diffusion + weight * physics, rel=1e-5)
        assert any(physics > 0 for _, physics in curves[f"{stage}/{side}_physics"])


def test_epoch_means_are_the_means_of_the_steps(workspace: Path) -> None:
    """With every step logged, an epoch's training loss is the average of its steps."""
    curves = series(workspace / RUN)
    for stage in STAGES:
        steps = [value for _, value in curves[f"{stage}/train_diffusion_step"]]
        for epoch, mean in curves[f"{stage}/train_diffusion"]:
            own = steps[(epoch - 1) * STEPS_PER_EPOCH : epoch * STEPS_PER_EPOCH]
            assert mean == pytest.approx(sum(own) / len(own), rel=1e-5)


@pytest.mark.parametrize("kind", ["best", "epoch_1", "final", "last"])
@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_hold_what_the_seed_promises(workspace: Path, stage: str, kind: str) -> None:
    """Six keys and one more, CPU tensors, a scaler state that is not empty, the epoch's index and loss."""
    checkpoint = load(workspace / RUN / f"{stage}_{kind}.pt")
    assert set(checkpoint) == {
        "model_state_dict",
        "optimizer_state_dict",
        "scaler_state_dict",
        "epoch",
        "val_loss",
        "config",
        "resume",
    }
    assert checkpoint["scaler_state_dict"]
    assert all(tensor.device.type == "cpu" for tensor in checkpoint["model_state_dict"].values())
    validation = dict(series(workspace / RUN)[f"{stage}/val_loss"])
    completed = checkpoint["epoch"] + 1
    assert checkpoint["val_loss"] == pytest.approx(validation[completed])
    expected = {
        "epoch_1": 1,
        "final": EPOCHS[stage],
        "last": EPOCHS[stage],
        "best": min(validation, key=validation.get),
    }
    if kind != "best":
        assert completed == expected[kind]
    else:
        assert checkpoint["val_loss"] == pytest.approx(min(value for epoch, value in validation.items() if epoch > 0))


def test_best_holds_the_ema_that_validation_saw_and_the_raw_weights(workspace: Path) -> None:
    """EMA weights differ from the raw ones and have the same names."""
    checkpoint = load(workspace / RUN / "stage_8_best.pt")
    raw, ema = checkpoint["model_state_dict"], checkpoint["resume"]["ema_state_dict"]
    assert raw.keys() == ema.keys()
    assert any(not torch.equal(raw[name], ema[name]) for name in raw)


def test_a_later_stage_leaves_an_earlier_one_alone(workspace: Path) -> None:
    """The model of stage_16 shares no weight and no mean with that of stage_8, and names its parent by content."""
    from app.train.ema import tensors_hash

    parent, child = (load(workspace / RUN / f"{stage}_best.pt") for stage in ("stage_8", "stage_16"))
    assert child["resume"]["parent"] == tensors_hash(parent["resume"]["ema_state_dict"])
    assert parent["resume"]["parent"] is None


SEED = """\
# Load checkpoint
checkpoint = torch.load('checkpoints/stage_64_best.pt')
model.load_state_dict(checkpoint['model_state_dict'])
optimizer.load_state_dict(checkpoint['optimizer_state_dict'])
scaler.load_state_dict(checkpoint['scaler_state_dict'])
start_epoch = checkpoint['epoch'] + 1
"""

SNIPPET = """
import torch
from app.model.denoiser import build_model

start = torch.load('checkpoints/stage_64_best.pt')
model = build_model(start['config'], 'stage_64')
optimizer = torch.optim.AdamW(model.parameters())
scaler = torch.amp.GradScaler('cpu')
{snippet}
assert start_epoch == 1, start_epoch
x = torch.zeros(1, 1, 64, 64, 64)
condition = model.condition(torch.zeros(1, 2, 64, 64), torch.ones(1, 2))
scaler.scale(model(x, torch.zeros(1), condition).mean()).backward()
scaler.step(optimizer)
scaler.update()
print('resumed', len(optimizer.state))
"""


def test_the_seeds_resume_snippet_works_word_for_word(tmp_path: Path) -> None:
    """In a fresh process, on a real stage_64 built from the file's own config; the README has the same text."""
    stage = (
        "[{resolution: 64, epochs: 1, samples_per_epoch: 2, batch: 2, sampler_steps: 1, prior_sweeps: 0, backbone: "
        "{patch: 8, widths: [8], blocks: 1, vit_width: 32, vit_depth: 1, vit_heads: 2, xray_widths: [8]}}]"
    )
    code, output = train(tmp_path, "--set", f"stages={stage}", "--set", "run_name=null")
    assert code == 0, output
    assert f"```python\n{SEED}```" in (ROOT / "README.md").read_text()
    result = subprocess.run(
        [sys.executable, "-c", SNIPPET.format(snippet=SEED)],
        cwd=tmp_path / "hybrid_vit_cascade",
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"resumed [1-9]\d*\n", result.stdout)


def test_a_finished_run_is_not_trained_again(workspace: Path) -> None:
    """The same command once more: exit 0, the checkpoints untouched, a line that says so."""
    before = (workspace / RUN / "stage_32_final.pt").stat().st_mtime_ns
    code, output = train(workspace)
    assert code == 0
    assert "all stages are finished; nothing to train" in output
    assert (workspace / RUN / "stage_32_final.pt").stat().st_mtime_ns == before
    assert (workspace / RUN / "DONE").exists()


def test_status_tells_where_the_run_is(workspace: Path) -> None:
    """Text for people, JSON for programs."""
    text = command(workspace, "status", *CONFIG).stdout
    assert re.search(r"^state +finished", text, re.MULTILINE)
    assert re.search(r"^step +8 of 8$", text, re.MULTILINE)
    fields = json.loads(command(workspace, "status", *CONFIG, "--json").stdout)
    assert fields["stage"] == "stage_32"
    assert fields["val_loss"] == load(workspace / RUN / "stage_32_last.pt")["val_loss"]


def test_status_without_a_run_names_those_that_exist(workspace: Path) -> None:
    """A wrong name is answered with the right ones."""
    result = command(workspace, "status", env={"RUN_NAME": "other"})
    assert result.returncode == 69
    assert "no run has started here; runs here: tiny (--config or RUN_NAME chooses one)" in result.stdout


def test_checkpoints_are_listed_and_verified(workspace: Path) -> None:
    """Every file whole, and the one that a resume would take."""
    result = command(workspace, "checkpoints", *CONFIG)
    assert result.returncode == 0
    files = sorted(path.name for path in (workspace / RUN).glob("*.pt"))
    assert all(re.search(rf"^{name} .* whole$", result.stdout, re.MULTILINE) for name in files)
    assert "(stage_32, epoch 2, step 8)" in result.stdout


def test_export_is_one_small_file_that_rebuilds_every_stage(workspace: Path, tmp_path: Path) -> None:
    """EMA weights and config, without optimizer, run name or paths."""
    from app.model.denoiser import build_model

    target = tmp_path / "cascade.pt"
    result = command(workspace, "export", *CONFIG, "--out", str(target))
    assert result.returncode == 0, result.stdout
    exported = load(target)
    assert list(exported["stages"]) == list(STAGES)
    for stage, content in exported["stages"].items():
        build_model(exported["config"], stage).load_state_dict(content["ema_state_dict"])
        ema = load(workspace / RUN / f"{stage}_best.pt")["resume"]["ema_state_dict"]
        assert all(torch.equal(ema[name], tensor) for name, tensor in content["ema_state_dict"].items())
    assert exported["config"]["run_name"] is None
    assert exported["config"]["data"]["path"] is None


def test_another_run_takes_over_finished_stages_by_hash(workspace: Path, tmp_path: Path) -> None:
    """init_from: the first stage is copied with its hash, and training begins with the second."""
    own = copy_of(workspace, tmp_path)
    for path in (own / RUN).glob("stage_[13]*"):
        path.unlink()
    code, output = train(own, "--set", "run_name=second", "--set", "init_from=tiny", "--stages", "stage_8", "stage_16")
    assert code == 0, output
    assert "init_from: took over stage_8 from tiny" in output
    assert "starting stage_16" in output
    second = own / RUN.parent / "second"
    assert (second / "stage_8_best.pt").read_bytes() == (own / RUN / "stage_8_best.pt").read_bytes()
    assert not (second / "stage_32_last.pt").exists()


def test_damaged_volumes_of_a_hand_over_are_made_again(workspace: Path, tmp_path: Path) -> None:
    """Empty, cut off, garbage: each is named, and what replaces it is the same, byte for byte."""
    own = copy_of(workspace, tmp_path)
    files = sorted(own.glob("cache/lowres/stage_8-*/*.npy"))
    before = {path: path.read_bytes() for path in files}
    damages = {files[0]: b"", files[1]: before[files[1]][:-1], files[2]: b"garbage"}
    for path, content in damages.items():
        path.write_bytes(content)
    for path in (own / RUN).glob("stage_[13]*"):
        path.unlink()
    code, output = train(own, "--set", "run_name=second", "--set", "init_from=tiny", "--stages", "stage_8", "stage_16")
    assert code == 0, output
    assert [path for path in files if f"{path}: damaged; it is made again" in output] == list(damages)
    assert {path: path.read_bytes() for path in files} == before


def test_progress_png_is_written(workspace: Path) -> None:
    """A picture beside the checkpoints."""
    assert (workspace / RUN / "progress.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_changed_scientific_setting_is_refused_with_a_list(workspace: Path) -> None:
    """Exit 74, old and new values, what to do; and a REASON file."""
    output = refused(workspace, 74, "--set", "seed=1", "--set", "optimizer.weight_decay=0.5")
    assert "this run was started with other scientific settings" in output
    assert re.search(r"seed +0 +1", output)
    assert re.search(r"optimizer\.weight_decay +0\.01 +0\.5", output)
    assert "start a new run with another run_name" in output
    assert "exit code 74" in (workspace / RUN / "REASON").read_text()


def test_a_changed_set_of_cases_is_refused(workspace: Path) -> None:
    """Two more phantoms are other data: exit 74 with both numbers."""
    output = refused(workspace, 74, "--set", "data.phantoms.count=8")
    assert "2 added, 0 removed since it began" in output


def test_a_swapped_parent_is_refused(workspace: Path, tmp_path: Path) -> None:
    """stage_16 was trained on another stage_8: both hashes are named."""
    own = copy_of(workspace, tmp_path)
    gone = ("stage_32*", "stage_16_[bfl]*", "stage_16_epoch_2.pt")
    for path in [found for pattern in gone for found in (own / RUN).glob(pattern)]:
        path.unlink()
    shutil.copy(own / RUN / "stage_8_epoch_1.pt", own / RUN / "stage_8_best.pt")
    output = refused(own, 74)
    assert "trained on the outputs of parent" in output
    assert "but the previous stage's best checkpoint is" in output


def test_checkpoints_that_are_all_damaged_are_not_started_over(workspace: Path, tmp_path: Path) -> None:
    """Exit 74, every file set aside; the next start refuses as well."""
    own = copy_of(workspace, tmp_path)
    for path in (own / RUN).glob("*.pt"):
        path.write_bytes(b"damaged")
    assert "It is not started over silently" in refused(own, 74)
    assert not list((own / RUN).glob("*.pt"))
    assert "It is not started over silently" in refused(own, 74)


def test_a_missing_parent_is_named(workspace: Path, tmp_path: Path) -> None:
    """The best checkpoint of the stage before is gone: the message names the file."""
    own = copy_of(workspace, tmp_path)
    for path in [*(own / RUN).glob("stage_32*"), own / RUN / "stage_16_best.pt"]:
        path.unlink()
    assert "stage_16_best.pt: missing or damaged, and the next stage is trained on its outputs" in refused(own, 74)


def test_init_from_a_run_without_finished_stages_is_refused(workspace: Path) -> None:
    """Exit 74 with the name of what is missing."""
    output = refused(workspace, 74, "--set", "run_name=fresh", "--set", "init_from=nobody")
    assert "has no finished stage_8 (its _best.pt and _final.pt)" in output


def test_an_unknown_stage_is_refused(workspace: Path) -> None:
    """Exit 78 with the stages that exist."""
    output = refused(workspace, 78, "--stages", "stage_7")
    assert "--stages stage_7: no such stage; this config has stage_8, stage_16, stage_32" in output


def test_a_second_trainer_is_turned_away(workspace: Path) -> None:
    """Exit 75 with the holder's process, while the run folder is locked."""
    from app.ops.run_lock import RunLock

    with RunLock(workspace / RUN / "run.lock", lambda: False):
        output = refused(workspace, 75)
    assert "another process trains in this run folder" in output
