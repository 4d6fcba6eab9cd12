"""`python -m app evaluate` on a trained run: its figures against the prepared files, its curves through TensorBoard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.physics.attenuation import hu_to_x
from app.train.inference import read_run
from app.train.loss import sample_losses
from app.workspace import RunDir
from tests.conftest import TINY
from tests.runs import RUN, command, load, train
from tests.scans import write_scan


@pytest.fixture(scope="module")
def workspace(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a finished tiny run."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("evaluated") / "workspace")


@pytest.fixture(scope="module")
def evaluation(workspace: Path) -> dict[str, Any]:
    """The figures that the command prints, on the two held-out patients."""
    done = command(workspace, "evaluate", "--config", str(TINY), "--json")
    assert done.returncode == 0, done.stdout
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def prepared(workspace: Path, case: str, name: str) -> np.ndarray:
    """An array of a prepared case."""
    (path,) = (workspace / "cache").glob(f"{case}-*/{name}.npy")
    array: np.ndarray = np.load(path)
    return array


def psnr(volume: np.ndarray, truth: np.ndarray) -> float:
    """Of two volumes in HU, range 2500."""
    return float(10 * np.log10(2500**2 / np.mean((volume.astype(np.float64) - truth) ** 2)))


def test_baselines_are_those_of_the_prepared_files(workspace: Path, evaluation: dict[str, Any]) -> None:
    """Air and the mean of the training cases, computed here from the cubes, at each stage and for each patient."""
    split = json.loads((workspace / RUN / "split.json").read_text())
    held_out = {case["id"] for case in split["val"]}
    for edge in (8, 16, 32):
        cases = evaluation["stages"][f"stage_{edge}"]["cases"]
        assert cases.keys() == held_out
        mean = np.mean([prepared(workspace, case["id"], f"ct_{edge}") for case in split["train"]], axis=0)
        for case, methods in cases.items():
            truth = prepared(workspace, case, f"ct_{edge}")
            assert methods["air"]["psnr_db"] == pytest.approx(psnr(np.full_like(truth, -1000), truth), abs=1e-3)
            assert methods["mean volume"]["psnr_db"] == pytest.approx(psnr(mean, truth), abs=1e-3)
            assert methods["air"]["projection_error_percent"] == pytest.approx(100)
            assert methods["SART-20"]["projection_error_percent"] < methods["mean volume"]["projection_error_percent"]
        # The largest error of a thorax of air is that of its bones.
        assert evaluation["stages"]["stage_32"]["mean"]["air"]["mae_bone_hu"] > 1200


@pytest.mark.parametrize("edge", [8, 16, 32])
def test_swapping_the_two_radiographs_raises_the_loss(workspace: Path, edge: int) -> None:
    """Of every patient, over several noise levels, with the trained weights; a stage is given the truth before it."""
    cascade = read_run(RunDir(workspace / RUN))
    trained = next(each for each in cascade.stages if each.stage.resolution == edge)
    model, window = cascade.build(trained, torch.device("cpu")), cascade.config.data.hu_window
    split = json.loads((workspace / RUN / "split.json").read_text())
    losses = {"right": 0.0, "swapped": 0.0}
    for number, case in enumerate([*split["train"], *split["val"]]):
        x_0 = hu_to_x(torch.from_numpy(prepared(workspace, case["id"], f"ct_{edge}")).float(), window)[None, None]
        right = torch.from_numpy(prepared(workspace, case["id"], f"xray_{edge}"))[None]
        lowres = None if model.is_first else torch.nn.functional.avg_pool3d(x_0, 2)
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(number))
        for name, xrays in (("right", right), ("swapped", right.flip(1))):
            condition = model.condition(xrays, torch.ones(1, 2), lowres)
            for level in (-4.0, 0.0, 2.0):
                loss = sample_losses(model, x_0, noise, torch.tensor([level]), condition, right)
                losses[name] += loss.diffusion.item()
    assert losses["swapped"] > losses["right"]


def test_gains_are_differences_of_what_is_printed(evaluation: dict[str, Any]) -> None:
    """Per stage: the mean over patients of prediction less c, less SART, less the shuffled X-rays."""
    for stage in evaluation["stages"].values():
        for name, other in (("gain over c", "c"), ("gain over SART-20", "SART-20"), ("X-ray use", "X-rays shuffled")):
            expected = [m["prediction"]["psnr_db"] - m[other]["psnr_db"] for m in stage["cases"].values()]
            assert stage["db_and_spread"][name] == pytest.approx([np.mean(expected), np.std(expected, ddof=1)])


def test_each_stage_is_fed_by_the_one_before(evaluation: dict[str, Any]) -> None:
    """c of a stage, averaged down, is near the previous prediction, and far from the truth as that one is."""
    for coarse, fine in (("stage_8", "stage_16"), ("stage_16", "stage_32")):
        before = evaluation["stages"][coarse]["mean"]["prediction"]["mae_all_hu"]
        given = evaluation["stages"][fine]["mean"]["c"]["mae_all_hu"]
        assert 0.9 * before < given < 2.5 * before


def test_the_same_command_gives_the_same_figures(workspace: Path, evaluation: dict[str, Any]) -> None:
    """Noise is a function of seed, stage and case; another seed gives others."""
    again = command(workspace, "evaluate", "--config", str(TINY), "--json", "--no-curves", "--pictures", "0")
    other = command(workspace, "evaluate", "--config", str(TINY), "--json", "--no-curves", "--seed", "1")
    for done, same in ((again, True), (other, False)):
        stages = json.loads(done.stdout[done.stdout.index("{") :])["stages"]
        assert (stages["stage_32"]["cases"] == evaluation["stages"]["stage_32"]["cases"]) == same


def test_curves_and_pictures_are_left_beside_the_run(workspace: Path) -> None:
    """Read back through TensorBoard, those of the last evaluation; the trainer's own curves are not written to."""
    folder = workspace / RUN / "evaluation" / "val"
    done = command(workspace, "evaluate", "--config", str(TINY), "--no-curves", "--samples", "2")
    assert "2 samples averaged" in done.stdout, done.stdout
    evaluation = json.loads((folder / "figures.json").read_text())
    assert len(list(folder.glob("*tfevents*"))) == 1
    events = EventAccumulator(str(folder))
    events.Reload()
    for name, stage in evaluation["stages"].items():
        points = events.Scalars(f"{name}/eval_psnr_db")
        assert {point.step for point in points} == {stage["epoch"]}
        assert points[0].value == pytest.approx(stage["mean"]["prediction"]["psnr_db"], abs=1e-4)
        assert events.Images(f"{name}/val_1")
    with Image.open(folder / "stage_32_1.png") as picture:
        assert picture.width > 600
        assert len(set(picture.convert("L").get_flattened_data())) > 50
    assert "PSNR3D" in (folder / "table.txt").read_text()
    assert len(list((workspace / RUN / "tensorboard").glob("*tfevents*"))) == 1


def test_test_patients_are_others(workspace: Path) -> None:
    """New phantoms; the folder of the run's own cases is as it was."""
    before = sorted(path.name for path in (workspace / "cache").iterdir())
    done = command(workspace, "evaluate", "--config", str(TINY), "--patients", "test", "--cases", "3", "--json")
    assert done.returncode == 0, done.stdout
    stages = json.loads(done.stdout[done.stdout.index('{\n "patients"') :])["stages"]
    split = json.loads((workspace / RUN / "split.json").read_text())
    own = {case["id"] for side in ("train", "val") for case in split[side]}
    assert len(stages["stage_32"]["cases"]) == 3
    assert not own & stages["stage_32"]["cases"].keys()
    assert sorted(path.name for path in (workspace / "cache").iterdir()) == before


def test_test_scans_that_the_run_knows_are_refused(tmp_path: Path) -> None:
    """One of its own among them: 65; others are evaluated, and the split and the cache of the run stay as they are."""
    for index in range(3):
        write_scan(tmp_path / "data" / f"scan{index}.nii.gz", index)
    code, output = train(tmp_path, "--set", "data.source=ct", "--set", "stages.*.epochs=1", "--stages", "stage_8")
    assert code == 0, output
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    write_scan(tmp_path / "others" / "scan5.nii.gz", 5)
    words = ("evaluate", "--config", str(TINY), "--data", str(tmp_path / "others"), "--no-curves")
    done = command(tmp_path, *words)
    assert done.returncode == 0, done.stdout
    assert "1 test patients" in done.stdout
    write_scan(tmp_path / "others" / "scan1.nii.gz", 1)
    done = command(tmp_path, *words)
    assert done.returncode == 65
    assert "1 of 2 test scans belong to the patients of this run" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_what_cannot_be_meant_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """No samples, no steps, no cases; and patients of the run in a folder of others."""
    for option in ("--samples", "--steps", "--cases"):
        done = command(tmp_path, "evaluate", option, "0")
        assert done.returncode == 2
        assert f"argument {option}: expected a whole number from 1, found '0'" in done.stdout
    done = command(tmp_path, "evaluate", "--data", str(tmp_path), "--patients", "val")
    assert done.returncode == 78
    assert "--data is a folder of test patients" in done.stdout


def test_a_damaged_checkpoint_is_named_and_left_where_it_is(workspace: Path, tmp_path: Path) -> None:
    """A reader does not hold the run: 74, and nothing is moved."""
    path = workspace / RUN / "stage_16_best.pt"
    whole = path.read_bytes()
    assert load(path)["epoch"] >= 0
    path.write_bytes(whole[:-100] + bytes(100))
    try:
        done = command(workspace, "evaluate", "--config", str(TINY))
    finally:
        path.write_bytes(whole)
    assert done.returncode == 74
    assert "stage_16_best.pt: damaged" in done.stdout
    assert not (workspace / RUN / "quarantine").exists()


def test_a_run_that_has_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """The message says what to do."""
    done = command(tmp_path, "evaluate", "--config", str(TINY))
    assert done.returncode == 74
    assert "no _best.pt yet; train first, or name another run" in done.stdout
