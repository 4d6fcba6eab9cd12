"""The errors that end a run, each with its exit code.

AppError
|-- DataError          65  the input data cannot be used as they are
|-- MachineError       69  no GPU where one is asked for, volume not writable, port taken, budget used up
|-- NumericsError      70  a loss or gradient is not finite
|-- CrashBudgetError   71  restarted too often without progress
|-- CheckpointError    74  checkpoints exist and none can be used, or they belong to another run
|-- LockError          75  another process trains in this run folder
|-- ConfigError        78  the configuration is wrong
`-- Stopped           143  stopped by a signal, state saved
"""


class AppError(Exception):
    """Base of every error with a message for the user; `app.__main__` turns it into its exit code."""

    exit_code = 1
    told = False
    """Whether another process of the run tells the user."""


class DataError(AppError):
    """The input data cannot be used as they are."""

    exit_code = 65


class MachineError(AppError):
    """The machine lacks something that the configuration asks for."""

    exit_code = 69


class NumericsError(AppError):
    """A loss or a gradient is not finite; raised before any weight moves."""

    exit_code = 70


class CrashBudgetError(AppError):
    """The run was restarted too often without progress."""

    exit_code = 71


class CheckpointError(AppError):
    """Checkpoints exist and none can be used, or they belong to another run."""

    exit_code = 74


class LockError(AppError):
    """Another process holds the run folder."""

    exit_code = 75


class ConfigError(AppError):
    """The configuration is wrong; the message lists every finding."""

    exit_code = 78


class Stopped(AppError):
    """A signal asked the process to stop; the state was saved."""

    exit_code = 143
