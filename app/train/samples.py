"""Prepared cases as batches of a stage.

Shapes: B batch, N cube edge, n edge of the previous stage.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from app.data.cases import Case, CaseStore
from app.physics.attenuation import hu_to_x


@dataclass(frozen=True)
class Batch:
    """Cases on the device of the model."""

    x_0: Tensor
    """(B, 1, N, N, N) in [-1, 1]."""
    xrays: Tensor
    """(B, 2, N, N) line integrals."""
    lowres: Tensor | None
    """(B, 1, n, n, n) in [-1, 1], the previous stage's own output; None in the first stage."""

    def lowres_truth(self) -> Tensor | None:
        """(B, 1, n, n, n): the truth averaged down to the previous stage's grid."""
        if self.lowres is None:
            return None
        return F.avg_pool3d(self.x_0, self.x_0.shape[-1] // self.lowres.shape[-1])


class Lowres(Protocol):
    """The previous stage's outputs."""

    def load(self, case: Case) -> np.ndarray:
        """(n, n, n) int16 HU."""


class LowresFolder:
    """The previous stage's outputs, one file per case, named by what made them."""

    def __init__(self, folder: Path) -> None:
        """`folder` is named by the hash of the parent's EMA tensors."""
        self.folder = folder

    def path(self, case: Case) -> Path:
        """(n, n, n) int16 HU."""
        return self.folder / f"{case.id}.npy"

    def holds(self, case: Case) -> bool:
        """Whether the file is there, and no shorter than its header says."""
        try:
            np.load(self.path(case), mmap_mode="r")
        except (FileNotFoundError, EOFError, ValueError):
            return False
        return True

    def load(self, case: Case) -> np.ndarray:
        """(n, n, n) int16 HU."""
        return np.load(self.path(case))  # type: ignore[no-any-return]


class StageCases(Dataset[dict[str, Tensor]]):
    """Cases of a split at the resolution of a stage. Loading is all that it does: nothing here is random."""

    def __init__(self, store: CaseStore, cases: Sequence[Case], edge: int, lowres: Lowres | None) -> None:
        """`lowres` is None in the first stage."""
        self.store, self.cases, self.edge, self.lowres = store, cases, edge, lowres

    def __len__(self) -> int:
        """The number of cases."""
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """hu (1, N, N, N) int16, xrays (2, N, N), lowres (1, n, n, n) int16 where there is a previous stage."""
        case = self.cases[index]
        loaded = self.store.load(case.id, self.edge)
        item = {"hu": torch.from_numpy(loaded.hu)[None], "xrays": torch.from_numpy(loaded.xrays)}
        if self.lowres is not None:
            item["lowres"] = torch.from_numpy(self.lowres.load(case))[None]
        return item


def batches(
    cases: StageCases,
    indices: Sequence[Sequence[int]],
    device: torch.device,
    hu_window: tuple[float, float],
    workers: int = 0,
) -> Iterator[Batch]:
    """The cases of `indices`, one batch per entry, in that order whatever the number of workers."""
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        cases,
        batch_sampler=indices,  # type: ignore[arg-type]
        num_workers=workers,
        worker_init_fn=partial(_end_with, os.getpid()),
        # What workers inherit, a blocked signal mask and their parent, is the trainer's only if it forks them itself.
        multiprocessing_context="fork" if workers else None,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )
    with _signals_held_back():
        items = iter(loader)
    for item in items:
        moved = {key: value.to(device, non_blocking=True) for key, value in item.items()}
        lowres = hu_to_x(moved["lowres"].float(), hu_window) if "lowres" in moved else None
        yield Batch(hu_to_x(moved["hu"].float(), hu_window), moved["xrays"], lowres)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """SIGTERM and SIGINT wait until the block ends, and never reach a process that is forked in it.

    A signal to the whole process group is the trainer's to answer: it needs its workers to finish the step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


PR_SET_PDEATHSIG = 1


def _end_with(trainer: int, _worker: int) -> None:
    """In a worker: be gone at once when the trainer is, however it went."""
    if sys.platform == "linux":
        # It is the thread that forked this process whose end counts: the main one.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != trainer:
        # The trainer was gone before it could be noticed.
        os.kill(os.getpid(), signal.SIGKILL)


def _kill_workers() -> None:
    """At the end of a trainer that crashed between two batches: multiprocessing would ask with SIGTERM and wait."""
    # torch would raise for the workers that are about to die.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# Registered after the hook of multiprocessing, which torch imports, and so called before it.
atexit.register(_kill_workers)
