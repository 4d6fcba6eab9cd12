"""The doctor's checks of GPUs, through the real pynvml above a library that stands in for the driver's."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pynvml
import pytest
import torch

from app.config import Config, StageConfig
from app.doctor import gpu
from app.doctor.finding import Finding, Verdict
from app.train.memory import CONTEXT_BYTES, StepMemory, step_memory
from tests.conftest import tiny_config
from tests.nvml_library import GIB, Card, Library, install

H100 = Card("GPU-1")
TITAN = Card("GPU-2", name="NVIDIA TITAN Xp", total=12 * GIB, capability=(6, 1))
WHEEL = "12.8"
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
"""Of torch 2.11 for CUDA 12.8."""


def seen(monkeypatch: pytest.MonkeyPatch, *cards: Card, visible: str | None = None, **driver: object) -> gpu.Seen:
    """What is seen of these cards."""
    install(monkeypatch, Library(*cards, **driver))
    return gpu.look("cuda", visible)


def verdict(finding: Finding | None) -> Verdict | None:
    """None where the question does not arise."""
    return None if finding is None else finding.verdict


def test_the_wheel_s_version_of_cuda_is_known_without_torch() -> None:
    """As torch says itself."""
    assert gpu.wheel_cuda() == torch.version.cuda


def test_cards_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what NVML says of driver, memory and architecture."""
    found = seen(monkeypatch, H100, TITAN, visible="1")
    assert found.driver is not None
    assert (found.driver.version, found.driver.cuda, found.driver.hidden) == ("570.86.15", (12, 8), 1)
    assert [(card.name, card.memory_bytes, card.capability) for card in found.cards] == [
        ("NVIDIA TITAN Xp", 12 * GIB, (6, 1))
    ]


@pytest.mark.parametrize(
    ("device", "on_pod", "expected", "words"),
    [
        ("cuda", False, Verdict.FAIL, "compute.device is cuda"),
        ("auto", True, Verdict.WARN, "on a rented pod, and compute.device is auto: trains on the CPU"),
        ("auto", False, Verdict.PASS, "compute.device is auto"),
        ("cpu", True, Verdict.PASS, "compute.device is cpu"),
    ],
)
@pytest.mark.parametrize("driver", [True, False])
def test_a_machine_without_gpus(
    monkeypatch: pytest.MonkeyPatch, driver: bool, device: gpu.Device, on_pod: bool, expected: Verdict, words: str
) -> None:
    """With a driver and without one."""
    install(monkeypatch, Library() if driver else None)
    finding = gpu.gpus(device, gpu.look(device, None), 1, on_pod)
    assert finding is not None
    assert (finding.verdict, finding.found.startswith("no GPU" if driver else "no NVIDIA driver")) == (expected, True)
    assert words in finding.found
    assert gpu.driver_suits(device, gpu.Seen(None, ()), WHEEL) is None


def test_gpus_that_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two, one on a pod that a CPU config trains on, one that is hidden."""
    two = seen(monkeypatch, H100, H100)
    found = gpu.gpus("cuda", two, 1, False)
    assert found is not None
    assert (found.verdict, found.found) == (
        Verdict.WARN,
        "2 x NVIDIA H100 80GB HBM3 (80 GiB); a run uses 1 of them",
    )
    assert "compute.processes" in found.what_to_do
    assert verdict(gpu.gpus("cuda", two, 2, False)) is Verdict.PASS
    assert verdict(gpu.gpus("cpu", two, 1, False)) is Verdict.PASS
    assert verdict(gpu.gpus("cpu", two, 1, True)) is Verdict.WARN
    hidden = gpu.gpus("cuda", seen(monkeypatch, H100, visible=""), 1, False)
    assert hidden is not None
    assert (hidden.verdict, "CUDA_VISIBLE_DEVICES hides 1" in hidden.found) == (Verdict.FAIL, True)


@pytest.mark.parametrize(
    ("driver", "cuda", "wheel", "expected", "advice"),
    [
        ("570.86.15", 12080, "12.8", Verdict.PASS, ""),
        ("535.104.05", 12020, "12.8", Verdict.PASS, ""),
        ("580.65.06", 13000, "12.8", Verdict.PASS, ""),
        ("470.57.02", 11040, "12.8", Verdict.FAIL, "driver 525 or newer"),
        ("570.86.15", 12080, "13.0", Verdict.FAIL, "driver 580 or newer"),
        ("580.65.06", 13000, "14.1", Verdict.FAIL, "one for CUDA 14"),
        ("570.86.15", 12080, None, Verdict.FAIL, "Install a torch with CUDA"),
    ],
)
def test_the_driver_runs_the_wheel_s_major_version_of_cuda(
    monkeypatch: pytest.MonkeyPatch, driver: str, cuda: int, wheel: str | None, expected: Verdict, advice: str
) -> None:
    """Minor versions are compatible, and newer drivers run older wheels."""
    finding = gpu.driver_suits("cuda", seen(monkeypatch, H100, driver=driver, cuda=cuda), wheel)
    assert finding is not None
    assert (finding.verdict, driver in finding.found) == (expected, True)
    assert advice in finding.what_to_do


def test_a_wheel_without_cuda_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning where `auto` would train on the CPU, nothing where that is meant."""
    found = seen(monkeypatch, H100)
    assert verdict(gpu.driver_suits("auto", found, None)) is Verdict.WARN
    assert verdict(gpu.driver_suits("cpu", found, None)) is Verdict.PASS


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Library and driver of two versions, or a card that fell off the bus: said once, by the check of the driver."""
    library = Library(H100)
    install(monkeypatch, library)
    library.starts = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    mismatch = gpu.look("cuda", None)
    library.starts = pynvml.NVML_SUCCESS
    lost = seen(monkeypatch, Card("GPU-1", every=pynvml.NVML_ERROR_GPU_IS_LOST))
    for found, words in ((mismatch, "NVML does not start: "), (lost, "NVML does not answer: GPU is lost")):
        finding = gpu.driver_suits("cuda", found, WHEEL)
        assert finding is not None
        assert (finding.verdict, finding.found.startswith(words)) == (Verdict.FAIL, True)
        assert verdict(gpu.driver_suits("cpu", found, WHEEL)) is Verdict.WARN
        assert gpu.gpus("cuda", found, 1, False) is None
        assert gpu.kernels("cuda", found) is None


def cuda(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    """This torch, as it would be with CUDA."""
    monkeypatch.setattr(torch.version, "cuda", WHEEL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ARCHITECTURES)


@pytest.fixture
def one_l4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that torch finds."""
    cuda(monkeypatch, available=True)
    monkeypatch.setattr(gpu, "wheel_cuda", lambda: WHEEL)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="NVIDIA L4", total_memory=22 * GIB, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.usefixtures("one_l4")
def test_a_slice_of_a_gpu_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML hides the GPU that it is a slice of; a GPU that is really hidden is none for torch either."""
    found = seen(monkeypatch, H100, visible="MIG-1")
    assert [card.name for card in found.cards] == ["NVIDIA L4"]
    assert verdict(gpu.gpus("cuda", found, 1, False)) is Verdict.PASS
    cuda(monkeypatch, available=False)
    assert seen(monkeypatch, H100, visible="").cards == ()


@pytest.mark.usefixtures("one_l4")
def test_without_nvml_torch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without the driver's capability `utility` trains, and has no gpu/ curves."""
    install(monkeypatch, None)
    found = gpu.look("cuda", None)
    assert [(card.name, card.capability) for card in found.cards] == [("NVIDIA L4", (8, 9))]
    finding = gpu.driver_suits("cuda", found, WHEEL)
    assert finding is not None
    assert (finding.verdict, "NVIDIA_DRIVER_CAPABILITIES" in finding.what_to_do) == (Verdict.WARN, True)
    assert verdict(gpu.gpus("cuda", found, 1, False)) is Verdict.PASS
    cuda(monkeypatch, available=False)
    assert gpu.look("cuda", None).cards == ()


def test_a_gpu_that_torch_has_no_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named with its architecture, beside those that torch has."""
    cuda(monkeypatch, available=True)
    assert verdict(gpu.kernels("cuda", seen(monkeypatch, H100))) is Verdict.PASS
    finding = gpu.kernels("cuda", seen(monkeypatch, H100, TITAN))
    assert finding is not None
    assert finding.verdict is Verdict.FAIL
    assert finding.found.endswith("compute_120, and nothing for sm_61 (NVIDIA TITAN Xp)")
    assert gpu.kernels("cpu", seen(monkeypatch, TITAN)) is None


def test_a_gpu_that_torch_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver has it, and CUDA does not start."""
    cuda(monkeypatch, available=False)
    finding = gpu.kernels("cuda", seen(monkeypatch, H100))
    assert finding is not None
    assert (finding.verdict, "torch cannot start CUDA" in finding.found) == (Verdict.FAIL, True)


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),
        ((12, 1), ["compute_90"], True),
        ((12, 1), ["compute_90a"], False),
        ((7, 5), ["compute_80"], False),
        ((12, 0), ["sm_75", "sm_120"], True),
        ((12, 0), [], False),
    ],
)
def test_which_gpus_kernels_run_on(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    """Machine code within its major version and upwards, PTX on all that came later, `a` on its own alone."""
    assert gpu.runs_on(built, capability) is runs


MIB = 2**20


def check_memory(monkeypatch: pytest.MonkeyPatch, config: Config, room: int, **card: object) -> Finding:
    """The check on a card with so many bytes beside its context."""
    return gpu.memory(config, seen(monkeypatch, Card("GPU-1", total=room + CONTEXT_BYTES, **card)), 1)


def test_a_config_too_large_for_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real count of the smallest stage: a single sample does not fit, and on a larger card all do."""
    config = tiny_config("compute.device=cuda", "stages.*.batch=1")
    config = config.model_copy(update={"stages": config.stages[:1]})
    once = cache(lambda config, stage, precision, count: step_memory(config, stage, precision, count))
    monkeypatch.setattr("app.train.memory.step_memory", once)
    peak = once(config, config.stages[0], "bf16", 1).peak
    fits = check_memory(monkeypatch, config, peak)
    assert (fits.verdict, "in bf16, predicted" in fits.found) == (Verdict.PASS, True)
    hopeless = check_memory(monkeypatch, config, peak - 1)
    assert (hopeless.verdict, "stage_8 (a single sample takes" in hopeless.what_to_do) == (Verdict.FAIL, True)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 10 MiB and 10 for each sample; twice that in fp32."""

    def count(config: Config, stage: StageConfig, precision: str, micro_batch: int | None = None) -> StepMemory:
        samples = micro_batch or stage.micro_batch or stage.batch
        return StepMemory(0, 0, (2 if precision == "fp32" else 1) * (10 + 10 * samples) * MIB)

    monkeypatch.setattr("app.train.memory.step_memory", count)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("room_mib", "expected", "advice"),
    [
        (130, Verdict.PASS, ""),
        (129, Verdict.WARN, "Set stages.stage_32.micro_batch=6: same curves"),
        (69, Verdict.WARN, "Set stages.stage_32.micro_batch=4: same curves"),
        (20, Verdict.WARN, "micro_batch=1: same curves"),
        (19, Verdict.FAIL, "(a single sample takes 0.0 GiB)"),
    ],
)
def test_the_largest_micro_batch_that_fits_is_named(
    monkeypatch: pytest.MonkeyPatch, room_mib: int, expected: Verdict, advice: str
) -> None:
    """Of those that divide the batch; each sample takes as much as the next."""
    config = tiny_config("compute.device=cuda", "stages.*.batch=1", "stages.stage_32.batch=12")
    finding = check_memory(monkeypatch, config, room_mib * MIB)
    assert (finding.verdict, advice in finding.what_to_do) == (expected, True)


@pytest.mark.usefixtures("counted")
def test_memory_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU run is compared with the machine's memory, a config for GPUs with nothing; old cards have no bf16."""
    config = tiny_config("stages.*.batch=1")
    assert gpu.memory(config, gpu.Seen(None, ()), 40 * MIB).verdict is Verdict.PASS
    assert gpu.memory(config, gpu.Seen(None, ()), 40 * MIB - 1).verdict is Verdict.FAIL
    on_gpu = tiny_config("stages.*.batch=1", "compute.device=cuda")
    nowhere = gpu.memory(on_gpu, gpu.Seen(None, ()), 1)
    assert (nowhere.verdict, nowhere.found.endswith("no GPU to compare it with")) == (Verdict.PASS, True)
    assert "in fp16" in check_memory(monkeypatch, on_gpu, 1, capability=(7, 5)).found
