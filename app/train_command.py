"""The command `train`: one attempt at a run, and what is left and told of an end that was not its own."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from app.env import Environment, launcher_ranks
from app.errors import AppError, LockError, MachineError, Stopped
from app.workspace import RunDir, Workspace

if TYPE_CHECKING:
    from app.config import Config
    from app.ops.notify import Notifier
    from app.ops.signals import StopSignal
    from app.train.parallel import Ranks

log = logging.getLogger(__name__)


def train_command(
    arguments: argparse.Namespace, env: Environment, load: Callable[[], Config], leave: Callable[[], None]
) -> int:
    """Train to the end or to a stop; the exit code.

    Args:
        arguments: of the command line.
        env: the environment.
        load: the config of this start; raises ConfigError.
        leave: ends the process at once after a signal, from any thread.

    Raises:
        AppError: the run is refused.
    """
    began = time.time()
    from app.ops.signals import StopSignal
    from app.ops.watchdog import Beat

    # First of all: what is imported next takes seconds, in which a signal must find its handler, and a slow disk may
    # make it hang.
    stop = StopSignal(leave)
    polled: Callable[[], bool] = stop
    if arguments.beat_fd is not None:
        polled = Beat(stop, arguments.beat_fd)
        polled()
    from app.ops.notify import Notifier
    from app.train.parallel import join

    ranks = join(launcher_ranks())
    heard = env if ranks.is_first else replace(env, notify_url=None)
    try:
        # A process that watches over this one says itself why it ends.
        with Notifier(heard, run=env.run_name, stop=stop, tells_end=arguments.beat_fd is None) as notifier:
            _train(arguments, env, load, polled, stop, ranks, notifier, began)
    except Stopped as error:
        log.info("%s; the same command goes on from here", error)
        return error.exit_code
    return 0


def _train(
    arguments: argparse.Namespace,
    env: Environment,
    load: Callable[[], Config],
    polled: Callable[[], bool],
    stop: StopSignal,
    ranks: Ranks,
    notifier: Notifier,
    began: float,
) -> None:
    """Train, and leave in the run folder why the run was refused or crashed."""
    from app.cascade import train
    from app.ops.crash_budget import record_crash
    from app.ops.refusal import leave_reason
    from app.train.volume import volume_error

    workspace = Workspace(env.workspace)
    run_dir: RunDir | None = None
    try:
        config = ranks.first(load)
        notifier.run, run_dir = config.run_name, workspace.run_dir(config.run_name)
        train(config, workspace, env, polled, stop, notifier, began, arguments.stages, arguments.fall_back, ranks)
        ranks.leave()
    except Stopped:
        raise
    except AppError as error:
        # With the lock held by another process, the folder is that process's to write in.
        if ranks.is_first and not isinstance(error, LockError):
            leave_reason(run_dir or workspace.run_dir(env.run_name), error)
        raise
    except Exception as error:
        full = volume_error(error)
        if full is None:
            if run_dir is not None and ranks.is_first:
                record_crash(error, run_dir)
            raise
        problem = MachineError(
            f"{workspace.root}: {full.strerror}. The checkpoints so far are whole. Make room or mount a larger volume, "
            "then run the same command: it goes on from the last of them"
        )
        if ranks.is_first:
            leave_reason(run_dir or workspace.run_dir(env.run_name), problem)
        raise problem from error
