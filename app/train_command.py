"""The command `train`: one attempt at a run, and what is left and told of an end that was not its own."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from app.env import Environment, cluster_node, hide_native_log, launcher_ranks
from app.errors import AppError, LockError, MachineError, Stopped
from app.workspace import RunDir, Workspace

if TYPE_CHECKING:
    from app.config import Config
    from app.ops.notify import Notifier
    from app.ops.signals import StopSignal
    from app.train.parallel import Ranks

log = logging.getLogger(__name__)

MARKED_WITHIN_S = 1.0


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
    from app.ops.signals import StopSignal, stop_with
    from app.ops.watchdog import Beat

    # First of all: what is imported next takes seconds, in which a signal must find its handler, and a slow disk may
    # make it hang.
    stop = StopSignal(leave)
    if arguments.launcher is not None:
        stop_with(arguments.launcher)
    place, node = launcher_ranks(), cluster_node()
    on_first_machine = node is None or node.rank == 0
    writes = on_first_machine and (place is None or place.rank == 0)
    if not on_first_machine:
        hide_native_log()
    polled: Callable[[], bool] = stop
    # On the other machines the launcher gives the signs of life: its processes wait for the first one's, silently.
    if arguments.beat_fd is not None and (place is None or place.node == 0):
        polled = Beat(stop, arguments.beat_fd)
        polled()
    from app.ops.notify import Notifier
    from app.train.parallel import join

    ranks = join(place)
    heard = env if writes else replace(env, notify_url=None)
    try:
        # A process that watches over this one says itself why it ends.
        with Notifier(heard, run=env.run_name, stop=stop, tells_end=arguments.beat_fd is None) as notifier:
            return _train(arguments, env, load, polled, stop, ranks, notifier, began, writes, on_first_machine)
    except Stopped as error:
        log.info("%s; the same command goes on from here", error)
        return error.exit_code


def _train(
    arguments: argparse.Namespace,
    env: Environment,
    load: Callable[[], Config],
    polled: Callable[[], bool],
    stop: StopSignal,
    ranks: Ranks,
    notifier: Notifier,
    began: float,
    writes: bool,
    on_first_machine: bool,
) -> int:
    """Train, and leave in the run folder why the run was refused or crashed; the exit code."""
    from app.ops.crash_budget import record_crash
    from app.ops.refusal import leave_reason
    from app.train.volume import volume_error

    workspace = Workspace(env.workspace)
    run_dir: RunDir | None = None
    try:
        config = ranks.first(load)
        notifier.run, run_dir = config.run_name, workspace.run_dir(config.run_name)
        if ranks.size == 1:
            code = _launched(arguments, config, polled, stop, notifier)
            if code is not None:
                return code
        from app.cascade import train

        train(config, workspace, env, polled, stop, notifier, began, arguments.stages, arguments.fall_back, ranks)
        ranks.leave()
        return 0
    except Stopped:
        raise
    except AppError as error:
        # With the lock held by another process, the folder is that process's to write in.
        if writes and not isinstance(error, LockError):
            leave_reason(run_dir or workspace.run_dir(env.run_name), error)
        raise
    except Exception as error:
        full = volume_error(error)
        if full is None:
            # Of several processes the first one knows only that another is gone.
            if run_dir is not None and on_first_machine:
                if not ranks.is_first:
                    # It is still about to mark the last step of all, at which the same error may come again.
                    time.sleep(MARKED_WITHIN_S)
                record_crash(error, run_dir)
            raise
        problem = MachineError(
            f"{workspace.root}: {full.strerror}. The checkpoints so far are whole. Make room or mount a larger volume, "
            "then run the same command: it goes on from the last of them"
        )
        if writes:
            leave_reason(run_dir or workspace.run_dir(env.run_name), problem)
        raise problem from error


def _launched(
    arguments: argparse.Namespace,
    config: Config,
    polled: Callable[[], bool],
    stop: StopSignal,
    notifier: Notifier,
) -> int | None:
    """Train in processes of their own, where there are several; their exit code, or None where there is one."""
    if launcher_ranks() is not None:
        return None
    from app.train.parallel import processes_here

    node = cluster_node()
    count = processes_here(config, arguments.stages, 1 if node is None else node.count)
    if count == 1 and node is None:
        return None
    from app.launch import launch

    # The first of the processes says it.
    notifier.tells_stop = False
    return launch(count, node, polled, stop, arguments.beat_fd)
