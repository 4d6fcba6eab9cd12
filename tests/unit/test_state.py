"""What a stage takes over from a checkpoint, what it refuses, and what one optimizer step may do."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.config import ComputeConfig
from app.errors import CheckpointError, MachineError, NumericsError
from app.train.handover import new_state
from app.train.loss import SampleLosses, sample_losses
from app.train.precision import Precision, choose_algorithms, choose_device, choose_precision
from app.train.samples import Batch
from app.train.state import StageState, load_ema
from app.train.step import train_step
from tests.conftest import tiny_config

CPU = torch.device("cpu")


def new(*overrides: str, fingerprint: str = "f" * 64, parent: str | None = None) -> StageState:
    """The first stage of the tiny cascade before its first step."""
    config = tiny_config(*overrides)
    precision = Precision(choose_precision(config.compute, CPU), CPU)
    return new_state(config, config.stages[0], CPU, precision, fingerprint, parent)


def batch(count: int = 2) -> Batch:
    """A cube in air with radiographs that show something."""
    source = torch.Generator().manual_seed(2)
    x_0 = torch.rand((count, 1, 8, 8, 8), generator=source) - 1
    return Batch(x_0, torch.rand((count, 2, 8, 8), generator=source), None)


def step(state: StageState, weight: float = 0.01) -> None:
    """One optimizer step on a fixed batch."""
    values = train_step(state, iter([batch()]), weight, stop=lambda: False)
    state.progress.step += 1
    state.progress.diffusion_sum += values.diffusion


def test_a_restored_stage_takes_the_very_next_step() -> None:
    """Two steps, a checkpoint, one more step: the same weights as three steps without it, bit for bit."""
    straight = new()
    for _ in range(3):
        step(straight)
    first = new()
    for _ in range(2):
        step(first)
    resumed = new()
    resumed.restore(first.payload(), "stage_8_last.pt")
    step(resumed)
    assert resumed.progress == straight.progress
    for one, other in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(resumed.ema.model.parameters(), straight.ema.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_micro_batches_give_the_step_of_the_whole_batch() -> None:
    """Two micro-batches of one sample: the same losses and, but for rounding, the same weights."""
    whole, parts = new(), new("stages.*.micro_batch=1")
    both = batch()
    values = train_step(whole, iter([both]), 0.01, stop=lambda: False)
    halves = iter([Batch(both.x_0[i : i + 1], both.xrays[i : i + 1], None) for i in range(2)])
    assert train_step(parts, halves, 0.01, stop=lambda: False).diffusion == pytest.approx(values.diffusion, rel=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.fixture
def kernels() -> Iterator[None]:
    """Torch's choice of kernels is put back."""
    before = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before


@pytest.mark.usefixtures("kernels")
def test_kernels_on_a_gpu_are_those_that_the_config_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic ones unless it says otherwise, as errors and not as warnings; on a CPU nothing is chosen."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    choose_algorithms(ComputeConfig(), CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    choose_algorithms(ComputeConfig(deterministic=False), torch.device("cuda"))
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == (False, True)
    choose_algorithms(ComputeConfig(), torch.device("cuda"))
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == (True, False)
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.usefixtures("kernels")
def test_a_step_without_a_deterministic_kernel_is_taken_again_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An operation that torch refuses in the second micro-batch: the step is that of a run which never asked."""
    halves = [Batch(batch().x_0[i : i + 1], batch().xrays[i : i + 1], None) for i in range(2)]
    plain, asked = new("stages.*.micro_batch=1"), new("stages.*.micro_batch=1")
    calls = []

    def losses(*arguments: Any) -> SampleLosses:
        calls.append(len(calls))
        if len(calls) > 1:
            torch.zeros(1).put_(torch.tensor([0]), torch.ones(1))
        return sample_losses(*arguments)

    values = train_step(plain, iter(halves), 0.01, stop=lambda: False)
    monkeypatch.setattr("app.train.step.sample_losses", losses)
    torch.use_deterministic_algorithms(True)
    with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        assert train_step(asked, iter(halves), 0.01, stop=lambda: False) == values
    assert len(calls) == 4
    assert [text.partition(". From")[0] for text in caplog.messages] == [
        "compute.deterministic: put_ does not have a deterministic implementation"
    ]
    for one, other in zip(plain.model.parameters(), asked.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_gradient_that_is_not_finite_moves_no_weight() -> None:
    """A voxel that is not a number: NumericsError with stage and step, and the weights are what they were."""
    state = new()
    before = [parameter.clone() for parameter in state.model.parameters()]
    broken = batch()
    broken.x_0[0, 0, 0, 0, 0] = math.nan
    with pytest.raises(NumericsError, match=r"stage_8 step 1 is not finite: diffusion loss nan.*No weight has moved"):
        train_step(state, iter([broken]), 0.0, stop=lambda: False)
    assert all(torch.equal(one, other) for one, other in zip(before, state.model.parameters(), strict=True))


def test_other_data_are_refused() -> None:
    """The fingerprint of the cases and the split, both values named."""
    with pytest.raises(CheckpointError, match=r"last\.pt: trained on another set of cases \(fingerprint a{12}, here f"):
        new().restore(new(fingerprint="a" * 64).payload(), "stage_8_last.pt")


def test_another_parent_is_refused() -> None:
    """The hash of the previous stage's EMA tensors, both values named."""
    with pytest.raises(
        CheckpointError, match=r"outputs of parent aaaaaaaaaaaa, but the previous stage's best .* is none"
    ):
        new().restore(new(parent="a" * 64).payload(), "stage_8_last.pt")


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    """For training and for a parent's EMA alike, with the name of the file and of the stage."""
    other = new("stages.stage_8.backbone.vit_width=64").payload()
    expected = r"its weights do not fit the model of stage_8: Error\(s\) in loading state_dict"
    with pytest.raises(CheckpointError, match=rf"stage_8_last\.pt: {expected}"):
        new().restore(other, "stage_8_last.pt")
    config = tiny_config()
    with pytest.raises(CheckpointError, match=rf"x\.pt: {expected}"):
        load_ema(config, config.stages[0], other["resume"]["ema_state_dict"], tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_the_scaler_state_is_never_empty_and_loads_into_a_plain_scaler(name: str) -> None:
    """Whatever the precision, the seed's `scaler.load_state_dict` accepts it."""
    state = Precision(name, CPU).state_dict()
    plain = torch.amp.GradScaler("cpu")
    plain.load_state_dict(state)
    assert plain.get_scale() == (65536.0 if name == "fp16" else 1.0)


def test_fp16_overflow_lowers_the_scale_and_tries_again_until_it_cannot() -> None:
    """Half the scale each time; at 1 it is an error that names the way out."""
    precision = Precision("fp16", CPU)
    assert not precision.overflowed(3.0)
    assert precision.overflowed(math.inf)
    assert precision.scaler.get_scale() == 32768.0
    for _ in range(15):
        assert precision.overflowed(math.nan)
    with pytest.raises(NumericsError, match=r"fp16 gradients overflow at scale 1: use compute\.precision bf16 or fp32"):
        precision.overflowed(math.inf)


def test_a_gpu_is_not_replaced_by_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """device cuda without a GPU is an error; auto takes what is there; the CPU computes in fp32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match=r"compute\.device is cuda and torch finds no GPU here"):
        choose_device(ComputeConfig(device="cuda"))
    assert choose_device(ComputeConfig(device="auto")) == CPU
    assert choose_precision(ComputeConfig(), CPU) == "fp32"
    assert choose_precision(ComputeConfig(precision="bf16"), CPU) == "bf16"


def test_bf16_trains_and_keeps_fp32_weights() -> None:
    """A step under autocast: finite, close to the fp32 step, weights in fp32."""
    exact, rounded = new(), new("compute.precision=bf16")
    values = [train_step(state, iter([batch()]), 0.01, stop=lambda: False) for state in (exact, rounded)]
    assert values[1].diffusion == pytest.approx(values[0].diffusion, rel=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in rounded.model.parameters())


def test_progress_travels_whole() -> None:
    """Every counter and sum of a stage comes back from a checkpoint."""
    state = new()
    state.progress = replace(state.progress, epochs=2, step=9, diffusion_sum=0.1, physics_sum=0.2, best_epochs=1)
    restored = new()
    restored.restore(state.payload(), "x.pt")
    assert restored.progress == state.progress
    assert restored.step_in_epoch == 1
