"""The commands: `python -m app COMMAND --help`. The only module that turns errors into exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from app.env import Environment
from app.errors import AppError, ConfigError, Stopped
from app.log import setup_logging
from app.workspace import RunDir, Workspace, atomic_write

log = logging.getLogger("app")

DESCRIPTION = "Train a three-stage cascade of 3D diffusion models, X-ray -> CT. Research use, not for clinical use."
EPILOG = """\
environment:
  WORKSPACE   data, cache, checkpoints and logs (default /workspace)
  CONFIG      config file where --config is not given
  RUN_NAME    overrides run_name of the config

exit codes:
  0 finished    65 bad data    69 machine    70 not finite    74 checkpoint refused
  75 run folder in use    78 bad configuration    143 stopped by a signal, state saved
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
    train.add_argument(
        "--stages", nargs="+", default=[], metavar="STAGE", help="train these only, such as stage_64 (default: all)"
    )
    prepare = _command(commands, "prepare", _prepare, "read the CTs of the data folder into the cache")
    prepare.add_argument("--show-names", action="store_true", help="print file names beside the pseudonyms")
    status = _command(commands, "status", _status, "stage, epoch, step, losses, ETA, last checkpoint")
    status.add_argument("--json", action="store_true", help="print the status as JSON")
    _command(commands, "checkpoints", _checkpoints, "list and verify the checkpoints, name the one to resume from")
    export = _command(commands, "export", _export, "write all finished stages into one file for use elsewhere")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, such as cascade.pt")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = parser().parse_args(argv)
    try:
        env = Environment.read()
        setup_logging(Workspace(env.workspace).logs if arguments.command == "train" else None, env)
    except AppError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    sys.excepthook = _log_crash
    try:
        return int(arguments.run(arguments, env))
    except AppError as error:
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
    from app.cascade import train
    from app.config_file import load_config
    from app.ops.signals import StopSignal

    stop = StopSignal()
    workspace = Workspace(env.workspace)
    run_dir: RunDir | None = None
    try:
        config = load_config(_config_path(arguments, env), arguments.overrides, env)
        run_dir = workspace.run_dir(config.run_name)
        train(config, workspace, env, stop, arguments.stages)
    except Stopped as error:
        log.info("%s; the same command goes on from here", error)
        return error.exit_code
    except AppError as error:
        _leave_reason(run_dir or workspace.run_dir(env.run_name), error)
        raise
    return 0


def _prepare(arguments: argparse.Namespace, env: Environment) -> int:
    from app.config_file import load_config
    from app.data.cases import prepare
    from app.data.report import NothingUsable
    from app.ops.signals import StopSignal

    stop = StopSignal()
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
    from app.ops.status import read_status, status_text

    run_dir = _run_dir(arguments, env)
    fields = read_status(run_dir)
    if arguments.json:
        import json

        print(json.dumps(fields, indent=1))
    else:
        print(status_text(run_dir, fields))
    return 0


def _checkpoints(arguments: argparse.Namespace, env: Environment) -> int:
    from app.train.listing import checkpoint_table

    text, usable = checkpoint_table(_run_dir(arguments, env))
    print(text)
    return 0 if usable else 74


def _export(arguments: argparse.Namespace, env: Environment) -> int:
    from app.train.export import export

    stages = export(_run_dir(arguments, env), arguments.out)
    print(f"{arguments.out}: {', '.join(stages)}, {arguments.out.stat().st_size / 2**20:.1f} MiB")
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


def _leave_reason(run_dir: RunDir, error: AppError) -> None:
    """A file beside the checkpoints that says why the run ended and what to do."""
    if run_dir.path.is_dir():
        text = f"exit code {error.exit_code}\n{error}\n"
        try:
            atomic_write(run_dir.reason, text.encode())
        except OSError as reason:
            log.error("%s cannot be written: %s", run_dir.reason, reason.strerror)


if __name__ == "__main__":
    sys.exit(main())
