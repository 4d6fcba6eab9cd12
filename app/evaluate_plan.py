"""The command line of `evaluate`, without the libraries that every other command would wait for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from app.argument_types import count, count_from_0
from app.errors import ConfigError


@dataclass(frozen=True)
class EvaluatePlan:
    """What is asked for."""

    patients: str
    """`val`, `train` or `test`."""
    data: Path | None
    """Folder of test patients; None are new phantoms."""
    cases: int | None
    """The first of them; None is all."""
    stages: tuple[str, ...]
    """Reported; empty is all."""
    steps: int | None
    """Of every stage's sampler; None are the config's."""
    samples: int
    pictures: int
    curves: bool
    seed: int
    device: str


def add_evaluate_arguments(command: argparse.ArgumentParser) -> None:
    """What `evaluate` takes besides the config."""
    command.add_argument("--patients", choices=("val", "train", "test"), help="of the run's split, or new ones (val)")
    command.add_argument("--data", type=Path, metavar="DIR", help="folder with the CTs of test patients")
    command.add_argument("--cases", type=count, metavar="N", help="the first N of them only")
    command.add_argument("--stages", nargs="+", default=[], metavar="STAGE", help="report these only (default: all)")
    command.add_argument("--steps", type=count, metavar="N", help="of the sampler (default: the config's)")
    command.add_argument("--samples", type=count, default=1, metavar="N", help="average N: best PSNR, no texture (1)")
    command.add_argument("--pictures", type=count_from_0, default=4, metavar="N", help="cases that are drawn (4)")
    command.add_argument("--no-curves", action="store_true", help="skip PSNR by sampler steps and by noise level")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampler's noise (0)")
    command.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one"
    )
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


def evaluate_plan(parsed: argparse.Namespace) -> EvaluatePlan:
    """The plan on a parsed command line.

    Raises:
        ConfigError: options that contradict each other.
    """
    if parsed.data is not None and parsed.patients not in (None, "test"):
        raise ConfigError("--data is a folder of test patients: leave --patients out, or say --patients test")
    return EvaluatePlan(
        patients=parsed.patients or ("test" if parsed.data is not None else "val"),
        data=parsed.data,
        cases=parsed.cases,
        stages=tuple(parsed.stages),
        steps=parsed.steps,
        samples=parsed.samples,
        pictures=parsed.pictures,
        curves=not parsed.no_curves,
        seed=parsed.seed,
        device=parsed.device,
    )
