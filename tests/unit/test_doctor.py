"""The doctor as a command, and how it runs its checks: deadlines, checks that raise, exit codes, table and JSON."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from app.doctor import report
from app.doctor.finding import Check, Finding, Verdict, examine, exit_code, failed, passed, warned
from app.doctor.settings import launch, secrets, variables
from app.env import ClusterNode, Secret
from app.errors import ConfigError, MachineError
from tests.conftest import TINY
from tests.runs import command

GOOD = passed("good", "as it should be")


def test_a_check_that_raises_is_a_failure_and_the_others_go_on() -> None:
    """Whatever it is; our own errors say what to do themselves, and a ConfigError is the configuration's."""

    def broken() -> Finding:
        raise ZeroDivisionError("by zero")

    def refused() -> Finding:
        raise ConfigError("expected a name")

    findings = list(examine([Check("a", broken), Check("b", refused), Check("c", lambda: GOOD), Check("d", none)]))
    assert [(each.name, each.verdict, each.of_config) for each in findings] == [
        ("a", Verdict.FAIL, False),
        ("b", Verdict.FAIL, True),
        ("good", Verdict.PASS, False),
    ]
    assert findings[0].found == "the check broke off with ZeroDivisionError: by zero"
    assert findings[1].found == "expected a name"


def none() -> None:
    """A question that does not arise."""


def test_a_check_that_hangs_is_left_behind() -> None:
    """After its deadline the next one begins; what lateness means is the check's to say."""
    never = threading.Event()
    try:
        checks = [
            Check("volume", lambda: (never.wait(), GOOD)[1], deadline_s=0.05, late_advice="another volume"),
            Check("server", lambda: (never.wait(), GOOD)[1], deadline_s=0.05, late=Verdict.WARN, remote=True),
            Check("good", lambda: GOOD),
        ]
        volume, good, server = examine(checks)
    finally:
        never.set()
    assert (volume.verdict, volume.found, volume.what_to_do) == (
        Verdict.FAIL,
        "no answer within 0.05 s",
        "another volume",
    )
    assert (good, server.name, server.verdict) == (GOOD, "server", Verdict.WARN)


def test_servers_are_asked_beside_the_other_checks() -> None:
    """A local check sees that the server of a later one has been asked, and the one after it has not begun."""
    asked, begun = threading.Event(), threading.Event()

    def server() -> Finding:
        asked.set()
        return GOOD

    def first() -> Finding:
        return GOOD if asked.wait(10) and not begun.is_set() else failed("first", "", "")

    def second() -> Finding:
        begun.set()
        return GOOD

    checks = [Check("first", first), Check("server", server, remote=True), Check("second", second)]
    assert list(examine(checks)) == [GOOD, GOOD, GOOD]


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([GOOD, warned("w", "x", "y")], 0),
        ([GOOD, failed("f", "x", "y")], MachineError.exit_code),
        ([failed("f", "x", "y"), Finding("c", Verdict.FAIL, "x", "y", of_config=True)], ConfigError.exit_code),
        ([Finding("c", Verdict.WARN, "x", "y", of_config=True)], 0),
    ],
)
def test_the_exit_code_says_what_is_to_be_put_right_first(findings: list[Finding], code: int) -> None:
    """Warnings are no failure; the configuration comes before the machine."""
    assert exit_code(findings) == code


def test_the_table_is_aligned_within_120_columns() -> None:
    """Long cells are wrapped below themselves, words longer than a cell are cut."""
    long = warned("wandb_key", "found " * 30 + "/" + "x" * 80, "do " * 40)
    lines = "\n".join([report.head(), report.row(GOOD), report.row(long)]).splitlines()
    assert max(map(len, lines)) <= 120
    starts = [lines[0].index(heading) for heading in report.HEADINGS]
    assert [line[: starts[2]].split() for line in lines[2:5]] == [["good", "PASS"], ["wandb_key", "WARN"], []]
    found, advice = zip(*((line[starts[2] : starts[3]], line[starts[3] :]) for line in lines[3:]), strict=True)
    assert all(cell == "" or cell[0] != " " for cell in (*found, *advice))
    assert "".join(found).replace(" ", "") == long.found.replace(" ", "")
    assert " ".join(advice).split() == ["do"] * 40


def test_the_log_has_only_what_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    """A line each, however long; a summary counts all."""
    caplog.set_level(logging.INFO)
    findings = [GOOD, warned("w", "first\n  second", "do"), failed("f", "x", "y")]
    for finding in findings:
        report.tell(finding)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "w: first; second. do"),
        ("ERROR", "f: x. y"),
    ]
    assert report.summary(findings) == "3 checks: 1 PASS, 1 WARN, 1 FAIL"
    assert report.summary([GOOD]) == "1 checks, all passed"


def test_no_secret_is_shown() -> None:
    """Whatever a check found."""
    shown = warned("w", "key 0123456789", "use 0123456789").without([Secret("0123456789")])
    assert (shown.found, shown.what_to_do) == ("key [hidden]", "use [hidden]")


def test_wrong_variables_placeholders_and_preset_ranks() -> None:
    """Each in its own line, with every variable that it is about."""
    assert variables(()).verdict is Verdict.PASS
    wrong = variables(["environment variable PORT: expected", "environment variable LOG_LEVEL: expected"])
    assert (wrong.verdict, wrong.of_config) == (Verdict.FAIL, True)
    assert wrong.found == "environment variable PORT: expected; environment variable LOG_LEVEL: expected"
    assert secrets({}).verdict is Verdict.PASS
    left = secrets({"HF_TOKEN": "{{ RUNPOD_SECRET_hf }}"})
    assert (left.verdict, left.found) == (
        Verdict.WARN,
        "HF_TOKEN holds the unresolved placeholder {{ RUNPOD_SECRET_hf }}",
    )
    assert launch({}, None).verdict is Verdict.PASS
    assert launch({"WORLD_SIZE": "1", "RANK": "0"}, None).verdict is Verdict.PASS
    trap = launch({"WORLD_SIZE": "8", "RANK": "3"}, None)
    assert (trap.verdict, trap.found) == (
        Verdict.WARN,
        "WORLD_SIZE=8, RANK=3 are preset, and no launcher started this process",
    )
    assert "NUM_NODES (more than 1)" in trap.what_to_do
    second = launch({"WORLD_SIZE": "8", "NUM_NODES": "2"}, ClusterNode(1, 2, "10.65.0.2", 29400))
    assert (second.verdict, second.found) == (
        Verdict.PASS,
        "machine 2 of 2 of a cluster, which meet at 10.65.0.2:29400",
    )


def test_the_command_examines_a_machine_and_a_config(tmp_path: Path) -> None:
    """All checks of the tiny cascade's first stage, as JSON; variables that others refuse are findings here."""
    config = yaml.safe_load(TINY.read_text())
    config["stages"] = config["stages"][:1]
    file, workspace = tmp_path / "one.yaml", tmp_path / "workspace"
    file.write_text(yaml.safe_dump(config))
    env = {
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "ofline",
        "RUNPOD_POD_ID": "abc123",
        "RUNPOD_API_KEY": "",
        "WORLD_SIZE": "8",
        "HF_TOKEN": "{{ RUNPOD_SECRET_hf }}",
    }
    done = command(workspace, "doctor", "--config", str(file), "--set", "run_name=x", "--json", "--offline", env=env)
    assert done.returncode == 78, done.stdout
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == 78
    found = {finding["name"]: finding for finding in answer["findings"]}
    verdicts = {name: finding["verdict"] for name, finding in found.items()}
    assert (
        verdicts.items()
        >= {
            "config": "PASS",
            "variables": "FAIL",
            "secrets": "WARN",
            "launch": "WARN",
            "volume": "PASS",
            "pod_disk": "WARN",
            "wandb_key": "PASS",
            "memory": "PASS",
            "shm": "PASS",
            "ram": "PASS",
            "write": "PASS",
            "room": "PASS",
            "data": "PASS",
        }.items()
    )
    assert "run x, stage_8" in found["config"]["found"]
    assert "WANDB_MODE: expected one of" in found["variables"]["found"]
    assert "HF_TOKEN" in found["secrets"]["found"]
    assert not {"wandb", "runpod", "clock"} & found.keys()
    assert list(tmp_path.iterdir()) == [file]


def test_a_config_that_is_refused_is_a_finding(tmp_path: Path) -> None:
    """With the words of the loader; what does not need it is examined all the same, in the brief form, too."""
    done = command(tmp_path, "doctor", "--config", str(TINY), "--set", "sed=1", "--offline")
    assert done.returncode == 78
    assert "sed: unknown key" in done.stdout
    assert "wandb_key  PASS" in done.stdout
    brief = command(tmp_path, "doctor", "--config", str(TINY), "--set", "sed=1", "--brief")
    assert brief.returncode == 78
    (line, summary) = brief.stdout.splitlines()
    assert "ERROR app.doctor.report: config: it is refused; the trainer says why. " in line
    assert summary.endswith("INFO app: doctor: 6 checks: 5 PASS, 1 FAIL")


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    """No torch, pydantic or numpy behind the command line."""
    program = (
        "import sys\nfrom app.__main__ import parser\ntry:\n    parser().parse_args(['doctor', '--help'])\n"
        "except SystemExit:\n    print(sorted({'torch', 'pydantic', 'numpy', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--offline" in done.stdout
