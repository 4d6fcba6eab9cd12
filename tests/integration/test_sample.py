"""Radiographs of a held-out patient become a CT volume, by the run and by the exported file."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from app.__main__ import parser
from app.errors import AppError, CheckpointError, ConfigError, MachineError, Stopped
from app.sample import sample
from app.sample_plan import sample_plan
from app.workspace import RunDir
from tests.runs import RUN, command

FOV = 384.0


@pytest.fixture(scope="module")
def workspace(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny cascade, its export, and radiographs of a held-out patient in `xrays/`."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("sampled") / "workspace")
    exported = command(folder, "export", "--config", "tests/tiny.yaml", "--out", str(folder / "cascade.pt"))
    assert exported.returncode == 0, exported.stdout
    split = json.loads((folder / RUN / "split.json").read_text())
    (case,) = (folder / "cache").glob(f"{split['val'][0]['id']}-*")
    (folder / "xrays").mkdir()
    np.save(folder / "xrays" / "truth.npy", np.load(case / "ct_32.npy"))
    for view, p in zip(("frontal", "lateral"), np.load(case / "xray_32.npy"), strict=True):
        np.save(folder / "xrays" / f"{view}.npy", p[::-1])
        counts = np.rint(60000 * np.exp(-p[::-1])).astype(np.uint16)
        Image.fromarray(counts).save(folder / "xrays" / f"{view}.png")
    return folder


def both(workspace: Path, kind: str = "npy") -> list[str]:
    """Options for the two radiographs."""
    folder = workspace / "xrays"
    return ["--frontal", f"{folder}/frontal.{kind}", "--lateral", f"{folder}/lateral.{kind}", "--whole-detector"]


def here(workspace: Path, *words: object, stopped: bool = False) -> str:
    """`python -m app sample` from the exported file, in this process."""
    parsed = parser().parse_args(["sample", "--model", str(workspace / "cascade.pt"), *map(str, words)])
    return sample(sample_plan(parsed), None, lambda: stopped)


def hu_of(path: Path) -> NDArray[np.int16]:
    """Voxels (z, y, x) in our axes, from the bytes of a .nii.gz file."""
    raw = gzip.decompress(path.read_bytes())
    size = struct.unpack_from("<3h", raw, 42)
    sform = np.array(struct.unpack_from("<12f", raw, 280)).reshape(3, 4)
    voxel = FOV / size[0]
    edge = (FOV - voxel) / 2
    np.testing.assert_allclose(sform, [[-voxel, 0, 0, edge], [0, -voxel, 0, edge], [0, 0, voxel, -edge]], atol=1e-3)
    return np.frombuffer(raw, "<i2", int(np.prod(size)), 352).reshape(size, order="F").T


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_run_and_its_export_make_the_same_volume_of_two_radiographs(workspace: Path, tmp_path: Path) -> None:
    """Two processes, the same bytes; the patient lies as in the truth; the run's folder is as before."""
    before = content(workspace / "hybrid_vit_cascade" / "checkpoints")
    options = [*both(workspace), "--calibrated", "--device", "cpu", "--seed", "4"]
    runs = {"run": ["--config", "tests/tiny.yaml"], "export": ["--model", str(workspace / "cascade.pt")]}
    for name, source in runs.items():
        done = command(workspace, "sample", *source, *options, "--out", str(tmp_path / f"{name}.nii.gz"))
        assert done.returncode == 0, done.stdout
        assert "stage_32, 32^3 voxels of 12 mm, seed 4, relaxation 1, projection error" in done.stdout
    assert content(workspace / "hybrid_vit_cascade" / "checkpoints") == before
    for suffix in (".nii.gz", ".png"):
        assert (tmp_path / f"run{suffix}").read_bytes() == (tmp_path / f"export{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.nii.gz", "export.png", "run.nii.gz", "run.png"]
    made, truth = hu_of(tmp_path / "run.nii.gz").ravel(), np.load(workspace / "xrays" / "truth.npy")
    likeness = np.corrcoef(made, truth.ravel())[0, 1]
    assert likeness > 0.8
    for axis in range(3):
        assert np.corrcoef(made, np.flip(truth, axis).ravel())[0, 1] < likeness - 0.002


def test_one_view_is_enough(workspace: Path, tmp_path: Path) -> None:
    """From the export, with counts of a known gain: the hidden lateral view changes nothing, the seed does."""
    options = ["--frontal", workspace / "xrays" / "frontal.png", "--whole-detector", "--intensity", "linear"]
    options += ["--gain", 1, "--air-visible"]
    text = here(workspace, *options, "--out", tmp_path / "one.nii.gz")
    assert "frontal.png, intensity, p = 1 t + " in text
    assert "relaxation 0.5" in text
    here(workspace, *options, "--out", tmp_path / "same.nii.gz")
    here(workspace, *options, "--seed", 1, "--out", tmp_path / "other.nii.gz")
    one, same, other = (hu_of(tmp_path / f"{name}.nii.gz") for name in ("one", "same", "other"))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (690, 896)


def test_samples_are_averaged(workspace: Path, tmp_path: Path) -> None:
    """Of more than one, the mean lies nearer to each than they lie to each other; an earlier stage is smaller."""
    options = [*both(workspace), "--calibrated", "--stage", "stage_16", "--steps", "1"]
    for samples in (1, 3):
        here(workspace, *options, "--samples", samples, "--out", tmp_path / f"{samples}.nii.gz")
    one, three = hu_of(tmp_path / "1.nii.gz"), hu_of(tmp_path / "3.nii.gz")
    assert one.shape == (16, 16, 16)
    assert 0 < np.abs(one.astype(float) - three).mean() < 200


def test_fitted_line_integrals_come_near_the_true_ones(workspace: Path, tmp_path: Path) -> None:
    """Without gain and offset: the fit to the mean gives a volume that fits the radiographs, and no alarm."""
    text = here(workspace, *both(workspace, "png"), "--intensity", "linear", "--out", tmp_path / "ct.nii.gz")
    gain = float(text.split("p = ")[1].split()[0])
    assert gain == pytest.approx(1, abs=0.2)


def test_radiographs_that_do_not_fit_are_told(
    workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A frontal image upside down, which no volume explains; one in the place of the lateral; another geometry."""
    folder = workspace / "xrays"
    np.save(tmp_path / "upside.npy", np.load(folder / "frontal.npy")[::-1])
    options = ["--lateral", folder / "lateral.npy", "--whole-detector", "--calibrated", "--out", tmp_path / "ct.nii.gz"]
    with caplog.at_level(logging.WARNING):
        here(workspace, "--frontal", tmp_path / "upside.npy", *options, "--preset", "c_arm")
        here(workspace, "--frontal", folder / "frontal.npy", "--lateral", folder / "frontal.npy", *options[2:])
    assert "upside.npy: looks more like the training cases upside down than as it is given (--frontal)" in caplog.text
    assert "frontal.npy: looks more like the training cases as the frontal view than as it is given" in caplog.text
    assert "taken at SDD 1020 / SOD 850 mm, the cascade was trained at 1800 / 1500 mm" in caplog.text
    alarms = [record for record in caplog.records if record.getMessage().startswith("UNLIKE TRAINING, do not trust")]
    assert len(alarms) == 1


def refusals(workspace: Path) -> dict[str, tuple[list[object], type[AppError], str]]:
    """Options, kind and words of refusals that need a cascade."""
    damaged = workspace / "damaged.pt"
    damaged.write_bytes((workspace / "cascade.pt").read_bytes()[:5000])
    return {
        "stage": (["--stage", "stage_64"], ConfigError, "it has stage_8, stage_16, stage_32"),
        "model": (["--model", workspace / "no.pt"], CheckpointError, "no.pt: no such file"),
        "damaged": (["--model", damaged], CheckpointError, "cannot be read as a file of `python -m app export`"),
        "source": (
            ["--source-to-detector-mm", 300, "--source-to-isocenter-mm", 100],
            ConfigError,
            "the X-ray source lies inside the cube",
        ),
        "device": (["--device", "cuda"], MachineError, "--device cuda: torch finds no GPU here"),
    }


@pytest.mark.parametrize("name", ["stage", "model", "damaged", "source", "device"])
def test_what_cannot_be_done_is_refused(
    workspace: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the right kind of error, and nothing is written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options, kind, words = refusals(workspace)[name]
    with pytest.raises(kind, match=words):
        here(workspace, *both(workspace), "--calibrated", "--out", tmp_path / "ct.nii.gz", *options)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_checkpoints_is_refused(workspace: Path, tmp_path: Path) -> None:
    """It says what to do."""
    parsed = parser().parse_args(["sample", *both(workspace), "--calibrated", "--out", str(tmp_path / "ct.nii")])
    with pytest.raises(CheckpointError, match=r"no _best\.pt yet; train first, or name another run"):
        sample(sample_plan(parsed), RunDir(tmp_path), lambda: False)


def test_a_stopped_command_leaves_nothing(workspace: Path, tmp_path: Path) -> None:
    """An older volume stays as it was."""
    (tmp_path / "ct.nii.gz").write_bytes(b"older")
    with pytest.raises(Stopped):
        here(workspace, *both(workspace), "--calibrated", "--out", tmp_path / "ct.nii.gz", stopped=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("ct.nii.gz", b"older")]
