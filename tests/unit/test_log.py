import logging
import re

import pytest

from app.env import Environment
from app.errors import MachineError
from app.log import setup_logging


@pytest.fixture(autouse=True)
def _restored_root_logger():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_a_line_has_utc_time_level_and_name_and_is_appended(tmp_path, capsys):
    """The file keeps the lines of the process before."""
    (tmp_path / "train.log").write_text("the line before\n")
    setup_logging(tmp_path, Environment.read({}))
    logging.getLogger("app.x").info("epoch %d", 3)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert lines[0] == "the line before"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO app\.x: epoch 3", lines[1])
    assert capsys.readouterr().err.splitlines() == lines[1:]


def test_secrets_are_hidden_in_messages_arguments_and_tracebacks(tmp_path, capsys):
    """The value of any variable that is secret by its name appears nowhere."""
    setup_logging(tmp_path, Environment.read({"WANDB_API_KEY": "0123456789", "NOTIFY_URL": "https://hooks.example/T0"}))
    log = logging.getLogger("app.x")
    log.warning("key %s", "0123456789")
    try:
        raise RuntimeError("POST https://hooks.example/T0 failed")
    except RuntimeError:
        log.exception("notify")
    text = (tmp_path / "train.log").read_text() + capsys.readouterr().err
    assert "0123456789" not in text
    assert "hooks.example" not in text
    assert "WARNING app.x: key [hidden]" in text
    assert "RuntimeError: POST [hidden] failed" in text


def test_a_placeholder_is_reported_in_the_log(capsys):
    """The warning of the environment reaches the reader."""
    setup_logging(None, Environment.read({"RUN_NAME": "{{ RUNPOD_SECRET_run }}"}))
    assert "RUN_NAME holds the unresolved placeholder {{ RUNPOD_SECRET_run }}" in capsys.readouterr().err


def test_a_log_folder_that_cannot_be_written_is_named(tmp_path):
    """A file where the folder should be."""
    (tmp_path / "logs").write_text("")
    with pytest.raises(MachineError) as caught:
        setup_logging(tmp_path / "logs", Environment.read({}))
    assert str(caught.value) == f"cannot write the log file {tmp_path / 'logs' / 'train.log'}: File exists"
