"""Checks of the GPUs: whether there are any, and whether driver, torch and memory suit them and the config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Literal

from app.config import Config
from app.doctor.finding import Finding, failed, passed, warned
from app.errors import MachineError
from app.ops.nvml import Card, Driver, installed_driver

GIB = 2**30
OLDEST_DRIVER = {12: 525, 13: 580}
"""For each major version of CUDA the first driver that runs all of it; others have the newest CUDA in their name."""
ARCHITECTURE = re.compile(r"(?P<kind>sm|compute)_(?P<major>\d+)(?P<minor>\d)(?P<only>[af]?)")
ANOTHER_MACHINE = "Start on a machine with a GPU"
FIRST_BF16 = (8, 0)

Device = Literal["auto", "cuda", "cpu"]


def wheel_cuda() -> str | None:
    """The version of CUDA that the installed torch was built for, without importing torch; None is none."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    version = spec_from_file_location("torch_version", Path(spec.origin).with_name("version.py"))
    assert version is not None
    assert version.loader is not None
    module = module_from_spec(version)
    version.loader.exec_module(module)
    found: str | None = module.cuda
    return found


@dataclass(frozen=True)
class Seen:
    """The GPUs of this machine as NVML has them, or torch where NVML has none."""

    driver: Driver | None
    cards: tuple[Card, ...]
    problem: str | None = None
    """Why the driver that is there cannot be asked."""


def look(device: Device, visible: str | None) -> Seen:
    """Find them.

    Args:
        device: of the config.
        visible: CUDA_VISIBLE_DEVICES; None is unset.
    """
    try:
        driver = installed_driver(visible)
    except MachineError as error:
        return Seen(None, (), str(error))
    cards = () if driver is None else driver.cards
    # NVML has no slices of GPUs (MIG), and is not in every container.
    if cards or device == "cpu" or wheel_cuda() is None or (driver is not None and not driver.hidden):
        return Seen(driver, cards)
    import torch

    if not torch.cuda.is_available():
        return Seen(driver, ())
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return Seen(driver, tuple(Card(card.name, card.total_memory, (card.major, card.minor)) for card in found))


def trains_on_gpu(device: Device, seen: Seen) -> bool:
    """What `train` will choose."""
    return bool(seen.cards) and device != "cpu"


def gpus(device: Device, seen: Seen, used: int, on_pod: bool) -> Finding | None:
    """Whether the config's device is here, and whether what is here is used."""
    if seen.problem is not None:
        # The check of the driver says it.
        return None
    cards = seen.cards
    found = _listed(cards) if cards else "no GPU" if seen.driver else "no NVIDIA driver, and so no GPU"
    if seen.driver and seen.driver.hidden and not cards:
        found += f"; CUDA_VISIBLE_DEVICES hides {seen.driver.hidden}"
    if not cards:
        if device == "cuda":
            what = (
                f"{ANOTHER_MACHINE} (a container needs `--gpus all`), or choose a config made for the CPU, such as "
                "configs/demo.yaml: train refuses (69)"
            )
            return failed("gpus", f"{found}; compute.device is cuda", what)
        if device == "auto" and on_pod:
            what = f"{ANOTHER_MACHINE}; compute.device=cuda would refuse to train on this one"
            return warned("gpus", f"{found} on a rented pod, and compute.device is auto: trains on the CPU", what)
        return passed("gpus", f"{found}; compute.device is {device}")
    if device == "cpu":
        if on_pod:
            what = "Set CONFIG to a config made for GPUs, such as configs/runpod.yaml"
            return warned("gpus", f"{found}, paid for and idle: compute.device is cpu", what)
        return passed("gpus", f"{found}; compute.device is cpu")
    if used < len(cards):
        what = "Set compute.processes, or give each stage a batch that is a multiple of the number of GPUs (a new run)"
        return warned("gpus", f"{found}; a run uses {used} of them", what)
    return passed("gpus", found)


def driver_suits(device: Device, seen: Seen, wheel: str | None) -> Finding | None:
    """Whether the driver runs the CUDA that torch was built for."""
    driver = seen.driver
    if seen.problem is not None:
        what = "Take another machine: driver and library do not fit, or a GPU is lost. Until then train finds no GPU"
        return (warned if device == "cpu" else failed)("driver", seen.problem, what)
    if driver is None and seen.cards:
        what = "Give the container NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        return warned("driver", "torch finds GPUs, and NVML is not found: no gpu/ curves", what)
    if driver is None:
        # The check of the GPUs says it.
        return None
    newest = ".".join(map(str, driver.cuda))
    found = f"driver {driver.version} (up to CUDA {newest}); torch is built for CUDA {wheel or 'none'}"
    if wheel is None:
        if device == "cpu":
            return passed("driver", found)
        what = "Install a torch with CUDA, as the image for GPUs has it: pip's default for this platform may lack it"
        return (failed if device == "cuda" else warned)("driver", found, what)
    major = int(wheel.split(".")[0])
    if driver.cuda[0] < major:
        needed = f"{OLDEST_DRIVER[major]} or newer" if major in OLDEST_DRIVER else f"one for CUDA {major}"
        what = f"Choose a machine with driver {needed} (RunPod: CUDA version), or an image built for CUDA {newest}"
        return failed("driver", found, what)
    return passed("driver", found)


def kernels(device: Device, seen: Seen) -> Finding | None:
    """Whether torch starts CUDA, and has kernels for each GPU."""
    cards = seen.cards
    if not trains_on_gpu(device, seen):
        return None
    import torch

    if torch.version.cuda is None:
        # The check of the driver says it.
        return None
    if not torch.cuda.is_available():
        what = "Look at the driver above; a GPU in an error state is cured by another pod"
        return failed("kernels", f"the driver has {_listed(cards)}, and torch cannot start CUDA", what)
    built = torch.cuda.get_arch_list()
    without = [card for card in cards if not runs_on(built, card.capability)]
    if without:
        kinds = ", ".join(f"sm_{card.capability[0]}{card.capability[1]} ({card.name})" for card in without)
        what = "Choose another kind of GPU, or an image with a torch that has kernels for this one"
        return failed("kernels", f"torch {torch.__version__} has {' '.join(built)}, and nothing for {kinds}", what)
    kinds = ", ".join(sorted({f"sm_{card.capability[0]}{card.capability[1]}" for card in cards}))
    return passed("kernels", f"torch {torch.__version__} has kernels for {kinds}")


def runs_on(built: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU runs kernels built for these architectures.

    Machine code `sm_XY` runs on X.Z with Z >= Y, PTX `compute_XY` on all that came later; `sm_90a` on 9.0 alone.
    """
    for match in filter(None, map(ARCHITECTURE.fullmatch, built)):
        own = int(match["major"]), int(match["minor"])
        if own == capability:
            return True
        later = capability > own if match["kind"] == "compute" else capability[0] == own[0] and capability > own
        if later and not match["only"]:
            return True
    return False


def memory(config: Config, seen: Seen, ram_bytes: int) -> Finding:
    """Whether a training step of each stage fits, by the prediction of `app.train.memory`.

    Args:
        config: the run.
        seen: the GPUs.
        ram_bytes: what a CPU run may use.
    """
    from app.train.memory import CONTEXT_BYTES, micro_batches, step_memory

    on_gpu = trains_on_gpu(config.compute.device, seen)
    nowhere = config.compute.device == "cuda" and not on_gpu
    room = min(card.memory_bytes for card in seen.cards) - CONTEXT_BYTES if on_gpu else ram_bytes
    precision = _precision(config, seen.cards if on_gpu else ())
    parts: list[str] = []
    smaller: list[str] = []
    hopeless: list[str] = []
    for stage in config.stages:
        sizes = micro_batches(stage)
        peak = step_memory(config, stage, precision, sizes[0]).peak
        parts.append(f"{stage.name} {peak / GIB:.1f}")
        if peak <= room or nowhere:
            continue
        least = peak if len(sizes) == 1 else step_memory(config, stage, precision, 1).peak
        if least > room:
            hopeless.append(f"{stage.name} (a single sample takes {least / GIB:.1f} GiB)")
        else:
            # Each further sample costs the same.
            fits = 1 + (room - least) // max(1, (peak - least) // (sizes[0] - 1))
            chosen = next(size for size in sizes[1:] if size <= fits)
            smaller.append(f"stages.{stage.name}.micro_batch={chosen}")
    place = "GPU" if on_gpu else "machine"
    found = f"a step takes {', '.join(parts)} GiB in {precision}, predicted"
    if nowhere:
        return passed("memory", f"{found}; there is no GPU to compare it with")
    found += f"; the {place} has {room / GIB:.1f}"
    if hopeless:
        what = f"A larger {place}, backbone.checkpoint_activations=true or a smaller backbone: {', '.join(hopeless)}"
        return failed("memory", found, what)
    if smaller:
        what = f"Set {' and '.join(smaller)}: same curves, nothing to find out; else train halves it by itself"
        return warned("memory", found, what)
    return passed("memory", found)


def _precision(config: Config, cards: Sequence[Card]) -> str:
    """As `app.train.precision.choose_precision`, from what NVML says of the cards."""
    if config.compute.precision != "auto":
        return config.compute.precision
    if not cards:
        return "bf16" if config.compute.device == "cuda" else "fp32"
    return "bf16" if min(card.capability for card in cards) >= FIRST_BF16 else "fp16"


def _listed(cards: Sequence[Card]) -> str:
    """`2 x NVIDIA H100 80GB HBM3 (80 GiB)`."""
    counts: dict[str, int] = {}
    for card in cards:
        kind = f"{card.name} ({card.memory_bytes / GIB:.0f} GiB)"
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in counts.items())
