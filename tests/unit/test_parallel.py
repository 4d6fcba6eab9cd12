"""Two processes of a run, met by gloo: they divide a step, agree on its end, and fail together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from app.data.report import NothingUsable, PrepareReport
from app.errors import AppError, ConfigError, DataError, NumericsError, Stopped
from app.train.micro_batch import MicroBatches
from app.train.parallel import ALONE, Ranks, interleaved, join
from app.train.samples import Batch, StageCases
from app.train.state import StageState
from app.train.step import train_step
from app.train.validation import validate
from tests.conftest import tiny_config
from tests.unit.test_stage import MemoryStore, set_up
from tests.unit.test_state import batch, new

CPU = torch.device("cpu")
CASES = 10
"""Held-out cases of the comparison: three chunks, so that the processes get different numbers of them."""


def own(ranks: Ranks, whole: Batch) -> Batch:
    """A process's share of a batch."""
    mine = ranks.samples(len(whole.x_0))
    return Batch(whole.x_0[mine.start : mine.stop], whole.xrays[mine.start : mine.stop], None)


def steps(ranks: Ranks, folder: Path) -> Any:
    """Three optimizer steps on one batch of four: the losses of each, gradients and weights after the last."""
    state = new("stages.*.batch=4")
    values = []
    for _ in range(3):
        step = train_step(state, iter([own(ranks, batch(4))]), 0.01, lambda: False, ranks)
        state.progress.step += 1
        values.append([step.diffusion, step.physics, step.gradient_norm])
    return values, gradients(state), state.model.state_dict()


def gradients(state: StageState) -> dict[str, torch.Tensor]:
    """Of the last step, by parameter; copies, because the next step uses their memory."""
    named = state.model.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def stopped_step(ranks: Ranks, folder: Path) -> Any:
    """Only the last process is asked to stop, before the second of three micro-batches."""
    state = new(f"stages.*.batch={3 * ranks.size}", "stages.*.micro_batch=1")
    before = [parameter.clone() for parameter in state.model.parameters()]
    polls = iter([False] * (10 if ranks.rank < ranks.size - 1 else 1))
    loader = iter([batch(1)] * 3)
    text = failure(lambda: train_step(state, loader, 0.01, lambda: not next(polls, False), ranks))
    same = all(torch.equal(one, other) for one, other in zip(before, state.model.parameters(), strict=True))
    return text, same


def too_large_step(ranks: Ranks, folder: Path) -> Any:
    """Only the last process has no room for two samples at a time; how many each takes, and the outcome."""
    state = new(f"stages.*.batch={4 * ranks.size}")
    sizes = MicroBatches(state.config, folder.parent / f"{ranks.rank}.json", CPU, "fp32", ranks)
    mine, taken = ranks.samples(4 * ranks.size), []

    def full(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if ranks.rank == ranks.size - 1 and len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def step() -> float:
        size = sizes.size(state.stage)
        taken.append(size)
        pieces = [slice(start, start + size) for start in range(mine.start, mine.stop, size)]
        whole = batch(4 * ranks.size)
        loader = iter([Batch(whole.x_0[piece], whole.xrays[piece], None) for piece in pieces])
        return train_step(state, loader, 0.01, lambda: False, ranks).diffusion

    state.model.backbone.register_forward_pre_hook(full)
    loss = sizes.until_it_fits(state.stage, step)
    return taken, loss, state.model.state_dict(), sorted(file.name for file in folder.parent.glob("*.json"))


def broken_step(ranks: Ranks, folder: Path) -> Any:
    """Only the last process has a voxel that is not a number."""
    state = new("stages.*.batch=4")
    whole = batch(4)
    whole.x_0[-1, 0, 0, 0, 0] = math.nan
    before = [parameter.clone() for parameter in state.model.parameters()]
    text = failure(lambda: train_step(state, iter([own(ranks, whole)]), 0.01, lambda: False, ranks))
    same = all(torch.equal(one, other) for one, other in zip(before, state.model.parameters(), strict=True))
    return text, same


def overflowing_step(ranks: Ranks, folder: Path) -> Any:
    """fp16 with a scale at which the gradients of the last process overflow: the scale and the counters after it."""
    state = new("stages.*.batch=2", "compute.precision=fp16")
    whole = batch(2)
    whole.x_0[-1] *= 1e3
    values = train_step(state, iter([own(ranks, whole)]), 0.0, lambda: False, ranks)
    return state.precision.state_dict(), math.isfinite(values.gradient_norm)


def missing_gradients(ranks: Ranks, folder: Path) -> Any:
    """A layer of two weights; only the first process has a gradient, and of the first weight alone."""
    layer = torch.nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[4.0, 8.0]]) if ranks.is_first else None
    terms, flags = ranks.reduce_step(layer, torch.tensor([1.0 + ranks.rank, 5.0]), False, ranks.rank == 1)
    return layer.weight.grad, layer.bias.grad, terms, flags


def validation(ranks: Ranks, folder: Path) -> Any:
    """Every figure of a validation, one picture among them."""
    state, cases = held_out(folder)
    found = validate(state.ema.model, cases, cases, state.config, 1, lambda: False, ranks)
    return found.diffusion, found.physics, found.sampled.psnr_db, len(found.pictures)


def stopped_validation(ranks: Ranks, folder: Path) -> Any:
    """Only the last process is asked to stop, in its losses; then only the first one, in the pictures."""
    state, cases = held_out(folder)
    last, polls = ranks.rank == ranks.size - 1, iter(range(100))
    in_losses = failure(lambda: validate(state.ema.model, cases, cases, state.config, 1, lambda: last, ranks))
    # The first process polls once per chunk and noise level: two chunks, two levels.
    first = ranks.is_first
    pictures = failure(
        lambda: validate(state.ema.model, cases, cases, state.config, 1, lambda: first and next(polls) >= 4, ranks)
    )
    return in_losses, pictures


def held_out(folder: Path) -> tuple[StageState, StageCases]:
    """A fresh stage and its held-out cases."""
    state, run, _ = set_up(folder, f"validation.cases={CASES}", "validation.noise_levels=2")
    cases = [
        replace(run.val.cases[0], id=str(index % 5), patient=str(index), content=str(index)) for index in range(CASES)
    ]
    return state, StageCases(MemoryStore(), cases, 8, None)  # type: ignore[arg-type]


def objects(ranks: Ranks, folder: Path) -> Any:
    """What the first process has, what all have, and tensors in place."""
    tensor = torch.full((2, 3, 1, 1, 1), float(ranks.rank)).to(memory_format=torch.channels_last_3d)
    ranks.share([tensor])
    shared = ranks.first(lambda: {"of": ranks.rank, "tensor": torch.ones(2)})
    return tensor.sum().item(), shared["of"], ranks.gather(ranks.rank), ranks.everyone(lambda: ranks.rank)


def failures(ranks: Ranks, folder: Path) -> Any:
    """The first process alone fails, with an error that cannot be pickled; then the last one alone."""

    def refuse() -> None:
        raise NothingUsable("no scans", PrepareReport(()))

    def lack() -> None:
        if ranks.rank == ranks.size - 1:
            raise NumericsError("not finite")

    return failure(lambda: ranks.first(refuse)), failure(lambda: ranks.everyone(lack))


def failure(work: Callable[[], Any]) -> tuple[int, str, bool]:
    """Exit code and text of the error that `work` raises, and whether another process of the run tells the user."""
    try:
        work()
    except AppError as error:
        return error.exit_code, str(error), error.told
    raise AssertionError("it did not fail")


SCENES = (
    steps,
    stopped_step,
    too_large_step,
    broken_step,
    overflowing_step,
    missing_gradients,
    validation,
    stopped_validation,
    objects,
    failures,
)


def play(rank: int, folder: str) -> None:
    """One of two processes: every scene, and its outcome into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, rank)
    outcomes = {scene.__name__: scene(ranks, Path(folder) / f"run{rank}") for scene in SCENES}
    torch.save(outcomes, f"{folder}/{rank}.pt")
    ranks.leave()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The outcomes of all scenes in the first and in the second of two processes."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(play, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_process_by_itself_is_the_first_of_one() -> None:
    """Without a launcher nothing is divided, sent or waited for."""
    assert join(None) is ALONE
    terms = torch.ones(2)
    assert ALONE.reduce_step(torch.nn.Linear(1, 1), terms, True, False) == (terms, [True, False])
    assert ALONE.mine([1, 2, 3]) == [1, 2, 3]
    assert ALONE.gather("x") == ["x"]
    with pytest.raises(DataError, match="no scans") as caught:
        ALONE.first(failing)
    assert not caught.value.told


def failing() -> None:
    """Work that fails."""
    raise DataError("no scans")


@pytest.mark.parametrize(("batch_size", "micro"), [(8, None), (8, 2), (8, 8), (12, 3), (24, 6)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_processes(
    batch_size: int, micro: int | None, size: int
) -> None:
    """Cases and numbers of each step, all processes together, are those of one process, in order."""
    stage = tiny_config(f"stages.*.batch={batch_size}", f"stages.*.micro_batch={micro or 'null'}").stages[0]
    order = torch.randperm(100).tolist() * 3
    order = order[: 5 * batch_size]
    divided = []
    for rank in range(size):
        ranks = Ranks(rank, size)
        parts = ranks.micro_batches(order, stage, ranks.micro_batch(stage))
        per_step = batch_size // size // ranks.micro_batch(stage)
        divided.append([list(chain(*parts[i : i + per_step])) for i in range(0, len(parts), per_step)])
    for step in range(5):
        start = step * batch_size
        assert list(chain(*(parts[step] for parts in divided))) == order[start : start + batch_size]
    assert [n for rank in range(size) for n in Ranks(rank, size).samples(batch_size)] == list(range(batch_size))


def test_a_micro_batch_that_does_not_divide_the_share_shrinks(caplog: pytest.LogCaptureFixture) -> None:
    """Batch 12 in micro-batches of 4 on two processes: 3 of 6, and the log says so."""
    stage = tiny_config("stages.*.batch=12", "stages.*.micro_batch=4").stages[0]
    assert (ALONE.micro_batch(stage), Ranks(1, 2).micro_batch(stage)) == (4, 3)
    with caplog.at_level(logging.INFO):
        Ranks(0, 2).check([stage])
    assert "stage_8: micro_batch is 3 instead of 4, which does not divide a process's 6 samples" in caplog.text


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    """Both numbers are named."""
    with pytest.raises(ConfigError, match=r"stages\.stage_8\.batch: 2 samples cannot be divided equally among 3 proc"):
        Ranks(0, 3).check(tiny_config().stages)


def test_what_is_written_is_made_by_the_first_machine() -> None:
    """Its processes share the work; those of the other machines have none."""
    first = [Ranks(rank, 4, rank, 2, 0).written([1, 2, 3, 4, 5]) for rank in range(2)]
    assert first == [[1, 3, 5], [2, 4]]
    assert Ranks(2, 4, 0, 2, 1).written([1, 2, 3]) == []
    assert ALONE.written([1, 2]) == [1, 2]


@pytest.mark.parametrize(("count", "size"), [(0, 2), (1, 2), (5, 2), (7, 3)])
def test_interleaved_undoes_mine(count: int, size: int) -> None:
    """Shares of processes, put together, are the list that was shared."""
    items = list(range(count))
    assert interleaved([Ranks(rank, size).mine(items) for rank in range(size)]) == items


def test_two_processes_make_the_steps_of_one(two: list[dict[str, Any]], tmp_path: Path) -> None:
    """Losses and the gradient's norm to 1e-5, gradients to 1e-5 of their norm; the two processes are equal to the bit.

    The first step's values to 1e-6. Weights only to a third of a step, 3e-4: where the gradient is rounding, Adam makes
    a whole step of it, and the values of later steps are those of such weights.
    """
    values, expected, weights = steps(ALONE, tmp_path)
    assert two[0]["steps"][0] == two[1]["steps"][0]
    divided, whole = torch.tensor(two[0]["steps"][0]), torch.tensor(values)
    torch.testing.assert_close(divided[0], whole[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(divided, whole, rtol=1e-5, atol=0)
    found = two[0]["steps"][1]
    assert found.keys() == expected.keys()
    error = torch.stack([(found[name] - expected[name]).norm() for name in found]).norm()
    assert error < 1e-5 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, tensor in two[0]["steps"][2].items():
        assert torch.equal(tensor, two[1]["steps"][2][name]), name
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=3e-4)


def test_a_stop_of_one_process_is_a_stop_of_all(two: list[dict[str, Any]]) -> None:
    """Raised in both at the same step, and no weight has moved."""
    for outcome in two:
        (code, text, _), same = outcome["stopped_step"]
        assert (code, text, same) == (Stopped.exit_code, "stopped in training", True)
        in_losses, in_pictures = outcome["stopped_validation"]
        assert in_losses[:2] == (Stopped.exit_code, "stopped in validation")
        assert in_pictures[:2] == (Stopped.exit_code, "stopped while sampling")


def test_what_does_not_fit_one_process_is_halved_in_all(two: list[dict[str, Any]]) -> None:
    """4, 2, then 1 at a time in both, with the same loss and weights after the step; the first one remembers."""
    (taken, loss, weights, files), (other_taken, other_loss, other_weights, _) = (one["too_large_step"] for one in two)
    assert taken == other_taken == [4, 2, 1]
    assert loss == other_loss
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())
    assert "0.json" in files
    assert "1.json" not in files


def test_a_loss_that_is_not_finite_in_one_process_stops_all(two: list[dict[str, Any]]) -> None:
    """The same error, and no weight has moved."""
    for outcome in two:
        (code, text, _), same = outcome["broken_step"]
        assert (code, same) == (NumericsError.exit_code, True)
        assert "stage_8 step 1 is not finite: diffusion loss nan" in text
    assert two[0]["broken_step"][0][1] == two[1]["broken_step"][0][1]


def test_an_fp16_overflow_in_one_process_is_one_in_all(two: list[dict[str, Any]]) -> None:
    """The scale is lower than at the start, and the same in both."""
    assert two[0]["overflowing_step"] == two[1]["overflowing_step"]
    state, finite = two[0]["overflowing_step"]
    assert finite
    assert state["scale"] < 65536.0


def test_a_missing_gradient_counts_as_zero(two: list[dict[str, Any]]) -> None:
    """The mean of (4, 8) and nothing is (2, 4); a parameter without any gradient gets zeros, in both processes."""
    for outcome in two:
        weight, bias, terms, flags = outcome["missing_gradients"]
        assert torch.equal(weight, torch.tensor([[2.0, 4.0]]))
        assert torch.equal(bias, torch.zeros(1))
        assert terms.tolist() == [1.5, 5.0]
        assert flags == [False, True]


def test_the_figures_of_a_validation_are_those_of_one_process(two: list[dict[str, Any]], tmp_path: Path) -> None:
    """To the bit, from three chunks on two processes; the first alone has the picture."""
    diffusion, physics, psnr, _ = validation(ALONE, tmp_path)
    assert two[0]["validation"] == (diffusion, physics, psnr, 1)
    assert two[1]["validation"][:2] == (diffusion, physics)
    assert two[1]["validation"][3] == 0


def test_values_travel(two: list[dict[str, Any]]) -> None:
    """Tensors in any memory format, objects to all, objects of all."""
    assert [outcome["objects"] for outcome in two] == [(0.0, 0, [0, 1], 0), (0.0, 0, [0, 1], 1)]


def test_an_error_of_one_process_is_raised_in_all_and_told_by_the_first(two: list[dict[str, Any]]) -> None:
    """Class, exit code and text are the same wherever it happened."""
    told = [tuple(told for _, _, told in outcome["failures"]) for outcome in two]
    assert told == [(False, False), (True, True)]
    for outcome in two:
        assert [part[:2] for part in outcome["failures"]] == [(65, "no scans"), (70, "not finite")]
