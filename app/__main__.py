"""The commands: `python -m app COMMAND --help`. The only module that turns errors into exit codes."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from app.chaos_plan import add_arguments, plan_of
from app.env import Environment, cluster_node, launcher_ranks
from app.errors import AppError, ConfigError, Stopped
from app.evaluate_plan import add_evaluate_arguments, evaluate_plan
from app.log import setup_logging
from app.runpod_commands import add_runpod_commands
from app.sample_plan import add_sample_arguments, sample_plan
from app.train_command import train_command
from app.workspace import RunDir, Workspace

if TYPE_CHECKING:
    from app.config import Config

log = logging.getLogger("app")

QUIET = ("doctor", "supervise", "supervise-trainer")
DESCRIPTION = "Train a three-stage cascade of 3D diffusion models, X-ray -> CT. Research use, not for clinical use."
EPILOG = """\
environment:
  WORKSPACE   data, cache, checkpoints and logs (default /workspace)
  CONFIG      config file where --config is not given
  RUN_NAME    overrides run_name of the config

exit codes:
  0 finished    65 bad data    69 machine    70 not finite    71 crash budget used up
  74 checkpoint refused    75 run folder in use    78 bad configuration    143 stopped by a signal, state saved
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m app",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _command(commands, "train", _train, "train the cascade, or go on where it was")
    supervise = _command(commands, "supervise", _supervise, "run trainer and dashboard; PID 1 of a container")
    train.add_argument(
        "--fall-back", action="store_true", help="set the newest state aside and go on from the one before it"
    )
    train.add_argument("--beat-fd", type=int, help=argparse.SUPPRESS)
    train.add_argument("--launcher", type=int, help=argparse.SUPPRESS)
    _add_runtime(supervise)
    keep = _command(commands, "supervise-trainer", _supervise_trainer, "train, again after a crash, within a budget")
    keep.add_argument("--pid-file", type=Path, metavar="FILE", help="where the trainer's process number stands")
    for command in (train, supervise, keep):
        command.add_argument(
            "--stages", nargs="+", default=[], metavar="STAGE", help="train these only, such as stage_64 (default: all)"
        )
    prepare = _command(commands, "prepare", _prepare, "read the CTs of the data folder into the cache")
    prepare.add_argument("--show-names", action="store_true", help="print file names beside the pseudonyms")
    status = _command(commands, "status", _status, "stage, epoch, step, losses, ETA, last checkpoint")
    status.add_argument("--json", action="store_true", help="print the status as JSON")
    listed = _command(
        commands, "checkpoints", _checkpoints, "list and verify the checkpoints, name the one to resume from"
    )
    listed.add_argument("--json", action="store_true", help="print the list as JSON")
    export = _command(commands, "export", _export, "write all finished stages into one file for use elsewhere")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, such as cascade.pt")
    add_sample_arguments(_command(commands, "sample", _sample, "turn two radiographs into a CT volume"))
    add_evaluate_arguments(
        _command(commands, "evaluate", _evaluate, "figures of a run on unseen patients, beside every baseline")
    )
    add_arguments(
        _command(commands, "chaos", _chaos, "rehearse the loss of machines: kill a run often, print a verdict")
    )
    doctor = _command(
        commands, "doctor", _doctor, "look for what is wrong before a run does: machine, volume, data, keys"
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--offline", action="store_true", help="ask no server")
    doctor.add_argument(
        "--brief", action="store_true", help="as at the start of a container: log what is wrong, skip what takes long"
    )
    summary = "serve TensorBoard over all runs, and /status, behind a password"
    dashboard = commands.add_parser("dashboard", help=summary, description=summary[0].upper() + summary[1:] + ".")
    dashboard.set_defaults(run=_dashboard)
    _add_runtime(dashboard)
    add_runpod_commands(commands)
    return top


def _add_runtime(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--runtime", type=Path, default=Path("/run"), metavar="DIR", help="for passwords and the like (default: /run)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments = parser().parse_args(words)
    except SystemExit as wrong:
        if words[:1] == ["supervise"] and wrong.code:
            return _park("wrong arguments, see above")
        raise
    try:
        # The doctor says what is wrong with variables, too.
        env = Environment.read_usable()[0] if arguments.command == "doctor" else Environment.read()
        place, node = launcher_ranks(), cluster_node()
        writes = arguments.command == "train" and (node is None or node.rank == 0)
        # What counts as unset is said by the doctor of the container, and by those who read it: once each.
        told = replace(env, warnings=()) if arguments.command in QUIET else env
        setup_logging(Workspace(env.workspace).logs if writes else None, told, 0 if place is None else place.rank)
    except AppError as error:
        if arguments.command == "supervise":
            return _park(str(error))
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    sys.excepthook = _log_crash
    try:
        return int(arguments.run(arguments, env))
    except AppError as error:
        if not error.told:
            log.error("%s", error)
        return error.exit_code


def _log_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An error that nobody foresaw goes into the log file too, with its traceback."""
    log.critical("crashed; started again, the run goes on from its last checkpoint", exc_info=(kind, error, trace))


Handler = Callable[[argparse.Namespace, Environment], int]


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: Handler, summary: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    command.set_defaults(run=run)
    command.add_argument("--config", metavar="FILE", help="the run's YAML file (default: the variable CONFIG)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="change a key, such as stages.stage_64.epochs=50; may be repeated",
    )
    return command


def _train(arguments: argparse.Namespace, env: Environment) -> int:
    def load() -> Config:
        from app.config_file import load_config

        return load_config(_config_path(arguments, env), arguments.overrides, env)

    return train_command(arguments, env, load, _leave_stopped)


def _supervise(arguments: argparse.Namespace, env: Environment) -> int:
    from app.ops.supervise import supervise

    try:
        return supervise(env, _train_arguments(arguments), _config_arguments(arguments), arguments.runtime)
    except OSError as error:
        return _park(f"cannot start: {error}")


def _park(problem: str) -> int:
    """A container that cannot start stays, because whatever leaves is started again, for ever."""
    from app.ops.supervise import park

    return park(problem)


def _supervise_trainer(arguments: argparse.Namespace, env: Environment) -> int:
    from app.config_file import load_config
    from app.ops.notify import Notifier
    from app.ops.supervise_node import NodeSupervision
    from app.ops.supervise_trainer import StopRequest, Supervision

    def load() -> Config:
        return load_config(_config_path(arguments, env), arguments.overrides, env)

    stop, node = StopRequest(), cluster_node()
    follows = node is not None and node.rank > 0
    heard = replace(env, notify_url=None) if follows else env
    with Notifier(heard, run=env.run_name, stop=stop) as notifier:
        return (NodeSupervision if follows else Supervision)(
            load_config=load,
            train_arguments=_train_arguments(arguments),
            stages=arguments.stages,
            env=env,
            stop=stop,
            pid_file=arguments.pid_file,
            notifier=notifier,
            machines=1 if node is None else node.count,
        ).run()


def _train_arguments(arguments: argparse.Namespace) -> list[str]:
    """The command line of `train` that means the same."""
    parts = _config_arguments(arguments)
    return [*parts, "--stages", *arguments.stages] if arguments.stages else parts


def _config_arguments(arguments: argparse.Namespace) -> list[str]:
    """What of it says the config."""
    parts = [] if arguments.config is None else ["--config", arguments.config]
    for text in arguments.overrides:
        parts += ["--set", text]
    return parts


def _prepare(arguments: argparse.Namespace, env: Environment) -> int:
    from app.ops.signals import StopSignal

    stop = StopSignal(_leave_stopped)
    from app.config_file import load_config
    from app.data.cases import prepare
    from app.data.report import NothingUsable

    config = load_config(_config_path(arguments, env), arguments.overrides, env)
    workspace = Workspace(env.workspace)
    workspace.ensure()
    try:
        report = prepare(config, workspace, stop=stop)
    except NothingUsable as error:
        print(error.report.table(arguments.show_names))
        raise
    print(report.table(arguments.show_names))
    return 0


def _status(arguments: argparse.Namespace, env: Environment) -> int:
    from app.ops.status import read_status, status_json, status_text

    run_dir = _run_dir(arguments, env)
    fields = read_status(run_dir)
    print(status_json(run_dir, fields) if arguments.json else status_text(run_dir, fields))
    return 0


def _checkpoints(arguments: argparse.Namespace, env: Environment) -> int:
    from app.train.listing import list_checkpoints

    listing = list_checkpoints(_run_dir(arguments, env))
    print(listing.as_json() if arguments.json else listing.table())
    return 74 if listing.resume_point is None else 0


def _export(arguments: argparse.Namespace, env: Environment) -> int:
    from app.train.export import export

    stages = export(_run_dir(arguments, env), arguments.out)
    print(f"{arguments.out}: {', '.join(stages)}, {arguments.out.stat().st_size / 2**20:.1f} MiB")
    return 0


def _sample(arguments: argparse.Namespace, env: Environment) -> int:
    from app.ops.signals import StopSignal

    stop, plan = StopSignal(_leave_stopped), sample_plan(arguments)
    from app.sample import sample

    print(sample(plan, _run_dir(arguments, env) if plan.model is None else None, stop))
    return 0


def _evaluate(arguments: argparse.Namespace, env: Environment) -> int:
    from app.ops.signals import StopSignal

    stop, plan = StopSignal(_leave_stopped), evaluate_plan(arguments)
    from app.evaluate import evaluate
    from app.evaluate_report import as_json, table

    found, folder = evaluate(_run_dir(arguments, env), Workspace(env.workspace), plan, stop)
    if arguments.json:
        import json

        print(json.dumps(as_json(found, plan.patients), indent=1))
    else:
        print(f"{table(found, plan.patients)}\n\ntable, figures.json and pictures are in {folder}")
    return 0


def _chaos(arguments: argparse.Namespace, env: Environment) -> int:
    from app.chaos import rehearse
    from app.config_file import load_config
    from app.ops.signals import StopSignal

    stop, path = StopSignal(), _config_path(arguments, env)
    config = load_config(path, arguments.overrides, env)
    plan = plan_of(arguments, path, _train_arguments(arguments))
    verdict = rehearse(config, plan, Workspace(env.workspace), stop)
    print(verdict.as_json() if arguments.json else verdict.table())
    return 0 if verdict.passed else 1


def _doctor(arguments: argparse.Namespace, env: Environment) -> int:
    from app.doctor import report
    from app.doctor.examination import Examination
    from app.doctor.finding import exit_code

    def load() -> tuple[str, Config]:
        from app.config_file import load_config

        path = _config_path(arguments, env)
        return path, load_config(path, arguments.overrides, env)

    # Whoever is tired of waiting has nothing to save.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not (arguments.json or arguments.brief):
        print(report.head(), flush=True)
    findings = []
    problems = Environment.read_usable()[1]
    for finding in Examination(env, problems, load, arguments.offline, arguments.brief).findings():
        findings.append(finding.without(env.secrets))
        if arguments.brief:
            report.tell(findings[-1])
        elif not arguments.json:
            print(report.row(findings[-1]), flush=True)
    if arguments.brief:
        log.info("doctor: %s", report.summary(findings))
    else:
        print(report.as_json(findings) if arguments.json else f"\n{report.summary(findings)}")
    return exit_code(findings)


def _dashboard(arguments: argparse.Namespace, env: Environment) -> int:
    from app.ops.dashboard import serve
    from app.ops.signals import StopSignal

    serve(Workspace(env.workspace), env, arguments.runtime, StopSignal())
    return 0


def _run_dir(arguments: argparse.Namespace, env: Environment) -> RunDir:
    """The run that a config names, or RUN_NAME, or the run without a name."""
    workspace = Workspace(env.workspace)
    if arguments.config is None and env.config is None:
        return workspace.run_dir(env.run_name)
    from app.config_file import load_config

    return workspace.run_dir(load_config(_config_path(arguments, env), arguments.overrides, env).run_name)


def _config_path(arguments: argparse.Namespace, env: Environment) -> str:
    path: str | None = arguments.config or env.config
    if path is None:
        raise ConfigError("no config: give --config FILE or set CONFIG; the shipped ones are in configs/")
    return path


def _leave_stopped() -> None:
    """After a signal, from any thread."""
    _leave(Stopped.exit_code)


def _leave(exit_code: int) -> None:
    """Leave without taking the interpreter down.

    With torch in it that takes seconds, in which a signal meets the default handlers and threads of gloo may abort.
    """
    # torch raises in its handler of SIGCHLD when a loading process ends.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(exit_code)


if __name__ == "__main__":
    exit_code = main()
    # A check of the doctor's that hangs is not waited for either.
    if exit_code == Stopped.exit_code or sys.argv[1:2] in (["train"], ["doctor"]):
        _leave(exit_code)
    sys.exit(exit_code)
