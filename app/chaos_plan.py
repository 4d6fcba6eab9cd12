"""The command line of `chaos`, without the libraries that every other command would wait for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DESCRIPTION = """\
Rehearse the loss of machines. Trains the config undisturbed, then again while it is killed at random moments
and started by the same command, and compares: no start that did not go on, checkpoints equal to the bit, each
step of each curve once. Exit code 0 where all of that holds, else 1.

--how kill    SIGKILL: the machine is gone
--how term    SIGTERM, and SIGKILL five seconds later to what is still there: a RunPod spot pod
--how mixed   one or the other, at random

The moments spread over the whole run, and some hit a start. A run takes as many kills as let it come further between
two rolling saves (checkpoint.save_every_s); where it finishes before all are used up, another one begins. Every run
prepares its data itself, under kills too, so that the time lost compares like with like.

It works in a new folder below the system's temporary folder, which is deleted where the verdict is good; CTs are
read from the data folder of WORKSPACE. W&B is off, and RUNPOD_... is hidden from the trainers.
"""


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    config_name: str
    arguments: Sequence[str]
    """Of the command `train`."""
    kills: int
    how: str
    """kill, term or mixed."""
    seed: int
    workspace: Path | None
    """Scratch folder that is kept; None makes one and deletes it where all is well."""
    reference: Path | None
    """Run folder of a run that nobody killed; None trains one."""


def add_arguments(chaos: argparse.ArgumentParser) -> None:
    """What `chaos` takes besides the config."""
    chaos.formatter_class = argparse.RawDescriptionHelpFormatter
    chaos.description = DESCRIPTION
    chaos.add_argument("--stages", nargs="+", default=[], metavar="STAGE", help="train these only (default: all)")
    chaos.add_argument("--kills", type=_positive, default=10, metavar="N", help="how many in all (10)")
    chaos.add_argument("--how", choices=("kill", "term", "mixed"), default="mixed", help="see above (mixed)")
    chaos.add_argument("--seed", type=int, default=0, help="of the moments and signals (0)")
    chaos.add_argument("--workspace", type=Path, metavar="DIR", help="scratch folder to keep; empty, or not there yet")
    chaos.add_argument("--reference", type=Path, metavar="DIR", help="run folder of this config, undisturbed, to reuse")
    chaos.add_argument("--json", action="store_true", help="print the verdict as JSON")


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return number


def plan_of(parsed: argparse.Namespace, config_name: str, train_arguments: Sequence[str]) -> Plan:
    """The plan on a parsed command line."""
    return Plan(
        config_name=config_name,
        arguments=train_arguments,
        kills=parsed.kills,
        how=parsed.how,
        seed=parsed.seed,
        workspace=parsed.workspace,
        reference=parsed.reference,
    )
