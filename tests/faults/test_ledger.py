"""What real processes leave in the ledger and tell a webhook: a killed run, a stopped one, a refused one."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import runs
from tests.runs import RUN, command, has_step, marked_step, series, train, wait_until
from tests.supervised import Container
from tests.webhook import SECRET_PATH, Webhook, webhook

AT_EPOCH_ENDS = ("--set", "checkpoint.save_every_s=1000")
STEPS_OF_AN_EPOCH = 4
LONG = ("--set", "stages.*.epochs=100000", "--set", "checkpoint.save_every_s=0.2")


@pytest.fixture
def hook() -> Iterator[Webhook]:
    """Somebody who is told."""
    with webhook() as state:
        yield state


def lines(run: Path, event: str) -> list[dict[str, Any]]:
    """Lines of the ledger."""
    found = map(json.loads, (run / "ledger.jsonl").read_text().splitlines())
    return [line for line in found if line["event"] == event]


def texts(run: Path, tag: str) -> list[tuple[int, str]]:
    """A text's points as TensorBoard's own reader sees them."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = events.Tensors(f"{tag}/text_summary" if f"{tag}/text_summary" in events.Tags()["tensors"] else tag)
    return [(point.step, point.tensor_proto.string_val[0].decode()) for point in found]


def test_a_killed_run_is_on_record_and_told(tmp_path: Path, hook: Webhook) -> None:
    """SIGKILL before the second epoch is saved, then the same command: lost steps, goodput, table, and who was told."""
    run, env = tmp_path / RUN, {"NOTIFY_URL": hook.url}
    # Saved before: `last` before the first step, then `last`, `best` and `epoch_1` of the first epoch.
    first = runs.start(tmp_path, *AT_EPOCH_ENDS, env=env, fault="kill_before_write:5")
    output, _ = first.communicate(timeout=120)
    assert first.returncode == -signal.SIGKILL, output
    assert [len(lines(run, event)) for event in ("start", "step", "end")] == [1, 1, 0]
    code, output = train(tmp_path, *AT_EPOCH_ENDS, env=env)
    assert code == 0, output

    before, after = lines(run, "start")
    curves = series(run)
    ((step, lost_steps),) = curves["ops/lost_steps"]
    assert (before["lost_steps"], after["lost_steps"]) == (0, lost_steps)
    assert lost_steps >= STEPS_OF_AN_EPOCH
    assert after["previous"] == {"kind": "vanished", "code": None, "global_step": step + lost_steps, "time": None}
    assert after["place"] | {"run_seconds": 0} == {
        "device": "cpu",
        "stage": "stage_8",
        "epoch": 1,
        "step": STEPS_OF_AN_EPOCH,
        "global_step": step,
        "run_seconds": 0,
    }
    assert after["repeated_s"] > 0
    assert [(line["kind"], line["code"], line["global_step"]) for line in lines(run, "end")] == [("finished", 0, 28)]

    assert [at for at, _ in curves["ops/goodput"]] == [4, 12, 20, 28]
    assert all(0 < share < 1 for _, share in curves["ops/goodput"])
    ((at, table),) = texts(run, "ops/ledger")
    assert at == step
    assert f"1 interruption (1 vanished): {lost_steps:.0f} steps" in table
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + 2
    found = json.loads(command(tmp_path, "status", "--config", "tests/tiny.yaml", "--json").stdout)
    assert found["ledger"]["goodput"] == pytest.approx(curves["ops/goodput"][-1][1], rel=0.5)
    assert [attempt["end"]["kind"] for attempt in found["ledger"]["attempts"]] == ["vanished", "finished"]
    human = command(tmp_path, "status", "--config", "tests/tiny.yaml").stdout
    assert "stage_8 step 4" in human

    assert hook.events == ["started", "resumed", *["stage finished"] * 3, "finished"]
    resumed = hook.posts[1]
    assert (resumed["run"], resumed["stage"], resumed["step"], resumed["epoch"]) == ("tiny", "stage_8", 4, 1)
    assert resumed["message"].endswith(f"on cpu; the attempt before vanished; {lost_steps:.0f} steps were lost")
    assert [(post["stage"], post["step"]) for post in hook.posts[2:5]] == [
        ("stage_8", 12),
        ("stage_16", 8),
        ("stage_32", 8),
    ]
    told = json.dumps(hook.posts)
    assert str(tmp_path) not in told
    for place in (output, table, human, (tmp_path / "hybrid_vit_cascade/logs/train.log").read_text()):
        assert SECRET_PATH not in place


def test_a_stopped_run_says_so_in_time_although_nobody_answers(tmp_path: Path, hook: Webhook) -> None:
    """A webhook that accepts and never answers: the run trains, saves on SIGTERM and is gone; then it finishes."""
    run, env = tmp_path / RUN, {"NOTIFY_URL": hook.url}
    hook.answering.clear()
    first = runs.start(tmp_path, *AT_EPOCH_ENDS, env=env)
    # In the second epoch: the first picture of the curves takes seconds on a busy machine, and no stop waits for it.
    wait_until(lambda: (run / "steps").exists() and marked_step(run) > STEPS_OF_AN_EPOCH, first)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=30)
    assert first.returncode == 143, output
    assert "the state is saved" in output
    assert "notifications: 127.0.0.1 did not take in time: st" in output
    told = len(hook.posts)
    assert set(hook.events) <= {"started", "stopping"}
    assert [(line["kind"], line["code"]) for line in lines(run, "end")] == [("stopped", 143)]
    hook.answering.set()
    code, output = train(tmp_path, *AT_EPOCH_ENDS, "--stages", "stage_8", env=env)
    assert code == 0, output
    after = lines(run, "start")[1]
    assert after["lost_steps"] == 0
    assert after["previous"].items() <= lines(run, "end")[0].items()
    assert hook.events[told:] == ["resumed", "stage finished", "finished"]
    assert "the attempt before stopped (exit code 143); 0 steps were lost" in hook.posts[told]["message"]


def test_under_supervision_each_event_is_told_once(
    start: Callable[..., Container], hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that is refused; then a run that is stopped, by whoever watches over the trainer."""
    monkeypatch.setenv("NOTIFY_URL", hook.url)
    refused = start("--set", "sed=1", command="supervise-trainer")
    assert refused.process.wait(30) == 78
    refused.close()
    assert hook.events == ["refused"]
    assert "sed: unknown key" in hook.posts[0]["message"]
    container = start(*LONG)
    container.until(lambda: has_step(container.workspace / RUN, "stage_8", 2)())
    assert container.stop()[0] == 143
    assert hook.events == ["refused", "started", "stopping"]
    assert hook.posts[2]["stage"] == "stage_8"
