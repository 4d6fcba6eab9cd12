"""The money guard and the end of a pod: real supervisors and trainers against a server that speaks RunPod's API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runpod_server import KEY, POD, RunPod, runpod
from tests.runs import RUN, has_step, manifest, series, train
from tests.supervised import Container, processes
from tests.webhook import Webhook, webhook

ACTION = f"/v2/pods/{POD}/action"
LONG = ("--set", "stages.*.epochs=100000", "--set", "checkpoint.save_every_s=0.2")
SHORT = ("--stages", "stage_8", "--set", "stages.*.epochs=1")
AT_ONCE = ("--set", "pod.grace_minutes=0.001")


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunPod]:
    """The account of the pod that the test's container runs on."""
    monkeypatch.setenv("RUNPOD_POD_ID", POD)
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    with runpod() as state:
        yield state


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    """Somebody who is told."""
    with webhook() as state:
        monkeypatch.setenv("NOTIFY_URL", state.url)
        yield state


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose run has finished what was asked for."""
    workspace = tmp_path_factory.mktemp("money") / "workspace"
    code, output = train(workspace, *SHORT)
    assert code == 0, output
    return workspace


def supervised(start: Callable[..., Container], account: RunPod, *arguments: str, **arranged: Any) -> Container:
    """A supervisor on that pod, with an API that is near and little patience; see `tests/on_pod.py`."""
    program = ("tests.on_pod", json.dumps({"api": account.url, **arranged}))
    return start(*arguments, *AT_ONCE, command="supervise-trainer", program=program)


def goes_down(container: Container, account: RunPod, status: str = "EXITED") -> int:
    """Wait until the pod is told to stop, then stop its container as RunPod does; its exit code."""
    container.until(lambda: account.status == status)
    container.until(lambda: "accepted by" in container.output)
    code, _ = container.stop()
    container.close()
    return code


def actions(account: RunPod) -> set[str]:
    """What was asked of the pod."""
    return {body["action"] for path, body in account.requests if path == ACTION}


def trainer_ended(run: Path) -> int:
    """Exit code of the last trainer, by whoever watched over it."""
    last = json.loads((run / "attempts.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "end"
    return int(last["code"])


def test_hours_end_a_run_that_is_saved_verified_stopped_and_refused_until_they_are_raised(
    start: Callable[..., Container], account: RunPod, hook: Webhook, tmp_path: Path
) -> None:
    """API v2 at once; the price of the API in curves and ledger; then 69 with the key to raise; then it goes on."""
    late = tmp_path / "late"
    first = supervised(start, account, *LONG, "--set", "pod.max_hours=100", late=str(late))
    run = first.workspace / RUN
    first.until(has_step(run, "stage_8", 2))
    trainer = first.trainer()
    late.touch()
    assert goes_down(first, account) == 69
    assert trainer not in processes()
    assert actions(account) == {"stop"}
    assert "/graphql" in account.paths()
    used_up = "pod.max_hours (100) is used up: all attempts at this run together took"
    assert used_up in first.output
    assert "accepted by API v2" in first.output
    whole = f"all {len(list(run.glob('stage_*.pt')))} checkpoints are whole; the run goes on from stage_8_last.pt"
    assert f"{whole}; this pod is stopped in 0.001 minutes" in first.output
    reason = (run / "REASON").read_text()
    assert reason.startswith(f"exit code 69\ntraining was ended: {used_up}")
    assert "To go on, raise pod.max_hours and start again\n" in reason
    assert reason.endswith(f"before the stop: {whole}\n")
    assert trainer_ended(run) == 143
    assert json.loads((run / "status.json").read_text())["state"] == "refused, exit code 69"
    curves = series(run)
    assert {"ops/cost_usd", "ops/cost_per_epoch_usd", "ops/cost_at_end_usd"} <= curves.keys()
    assert json.loads((run / "ledger.jsonl").read_text().splitlines()[0])["usd_per_hour"] == 0.44
    assert hook.events == ["started", "refused", "stopping"]
    assert "pod.max_hours (100) is used up" in hook.posts[1]["message"]
    assert whole in hook.posts[2]["message"]

    saved, account.status = len(manifest(run)), "RUNNING"
    second = supervised(start, account, *LONG, "--set", "pod.max_hours=0.0001")
    assert goes_down(second, account) == 69
    assert "not started: pod.max_hours (0.0001) is used up" in second.output
    assert "To go on, raise pod.max_hours and start again" in second.output
    assert "app.cascade" not in second.output
    assert len(manifest(run)) == saved
    reason = (run / "REASON").read_text()
    assert reason.startswith("exit code 69\nnot started: pod.max_hours (0.0001) is used up")
    assert reason.count("before the stop: ") == 1

    third = supervised(start, account, *LONG, "--set", "pod.max_hours=200")
    third.until(lambda: len(manifest(run)) > saved + 1)
    assert not (run / "REASON").exists()
    assert third.stop()[0] == 143


def test_costs_end_a_run_and_graphql_stops_its_pod(
    start: Callable[..., Container], account: RunPod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable's price; version 2 knows no such pod; a next start is refused by what the ledger says it cost."""
    monkeypatch.setenv("POD_COST_PER_HOUR", "3600")
    account.faults[ACTION] = [404]
    late = tmp_path / "late"
    limit = ("--set", "pod.max_cost_usd=1e6")
    first = supervised(start, account, *LONG, *limit, late=str(late))
    run = first.workspace / RUN
    first.until(has_step(run, "stage_8", 2))
    assert account.requests == []
    late.touch()
    assert goes_down(first, account) == 69
    assert account.paths()[:2] == [ACTION, "/graphql"]
    assert "accepted by GraphQL" in first.output
    assert "pod.max_cost_usd (1e+06) is used up: all attempts at this run together cost 36" in first.output
    assert trainer_ended(run) == 143

    account.status = "RUNNING"
    second = supervised(start, account, *LONG, "--set", "pod.max_cost_usd=0.5")
    assert goes_down(second, account) == 69
    assert "not started: pod.max_cost_usd (0.5) is used up" in second.output
    assert "raise pod.max_cost_usd and start again" in (run / "REASON").read_text()


def test_an_idle_gpu_ends_a_run_and_a_busy_api_is_asked_again(start: Callable[..., Container], account: RunPod) -> None:
    """NVML says 0 % while the CPU trains; 429, then 200."""
    account.faults[ACTION] = [429]
    idle = supervised(start, account, *LONG, "--set", "pod.max_idle_gpu_minutes=0.05", gpu_percent=0)
    run = idle.workspace / RUN
    assert goes_down(idle, account) == 69
    assert account.paths()[:3] == ["/graphql", ACTION, ACTION]
    assert "accepted by API v2" in idle.output
    assert "all GPUs were at 0 % for" in (run / "REASON").read_text()
    assert trainer_ended(run) == 143

    account.status = "RUNNING"
    busy = supervised(start, account, *LONG, "--set", "pod.max_idle_gpu_minutes=0.05", gpu_percent=3)
    saved = len(manifest(run))
    busy.until(lambda: len(manifest(run)) > saved + 10)
    assert "all GPUs were at" not in busy.output
    assert busy.stop()[0] == 143
    assert account.status == "RUNNING"


def test_a_pod_that_cannot_be_stopped_keeps_its_result_and_says_so_again_and_again(
    start: Callable[..., Container], account: RunPod, hook: Webhook
) -> None:
    """Both interfaces are down, at the start too: it trains without a price, ends, and is loud until one answers."""
    account.faults = {ACTION: [503] * 14, "/graphql": [503] * 16}
    container = supervised(start, account, *SHORT)
    loud = (
        "THIS POD COULD NOT BE STOPPED AND COSTS MONEY: stop or terminate it in the console. The run's files are safe"
    )
    container.until(lambda: container.output.count(loud) >= 3)
    assert goes_down(container, account) == 0
    run = container.workspace / RUN
    assert "the price of this pod is not known" in container.output
    assert "finished: --stages stage_8" in container.output
    assert not any("usd" in tag for tag in series(run))
    assert {"stage_8_final.pt", "stage_8_best.pt"} <= {line["file"] for line in manifest(run)}
    assert "Traceback" not in container.output
    assert KEY not in container.output
    assert hook.events[-3:] == ["finished", "stopping", "pod not stopped"]


def test_outside_runpod_the_end_says_what_it_would_do(start: Callable[..., Container], trained: Path) -> None:
    """And does it not."""
    container = start(*SHORT, "--set", "pod.on_finish=stop", command="supervise-trainer")
    shutil.copytree(trained, container.workspace, dirs_exist_ok=True)
    assert container.process.wait(240) == 0
    container.close()
    assert "dry run: RUNPOD_POD_ID is not set" in container.output
    assert "the checkpoints would be verified and the pod stopped after 30 minutes" in container.output


def test_a_damaged_checkpoint_is_said_loudly_and_the_pod_is_stopped_all_the_same(
    start: Callable[..., Container], account: RunPod, hook: Webhook, trained: Path, tmp_path: Path
) -> None:
    """It would cost money for nothing: the other files are whole, and the disk survives the stop."""
    shutil.copytree(trained, tmp_path / "workspace")
    damaged = tmp_path / "workspace" / RUN / "stage_8_last.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    container = supervised(start, account, "--set", "data.source=nonsense", grace_minutes=0.001)
    assert goes_down(container, account) == 78
    # A config that cannot be read names no run, and the run without a name has no checkpoints.
    assert "there are no checkpoints to verify" in container.output

    account.status = "RUNNING"
    again = supervised(start, account, "--set", "pod.max_hours=1e-9")
    assert goes_down(again, account) == 69
    count = len(list(damaged.parent.glob("stage_*.pt")))
    found = f"1 OF {count} CHECKPOINTS ARE DAMAGED: stage_8_last.pt (its content is not what was written"
    assert found in again.output
    assert f"before the stop: {found}" in (damaged.parent / "REASON").read_text()
    assert damaged.exists()
    assert hook.events == ["refused", "stopping", "refused", "verification failed", "stopping"]
    assert "CHECKPOINTS ARE DAMAGED" in hook.posts[3]["message"]


def test_only_a_finished_run_on_a_network_volume_is_terminated(
    start: Callable[..., Container],
    account: RunPod,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mounted: Path,
) -> None:
    """Without the volume it is refused before it trains, and stopped; with it, a finished run's pod is terminated."""
    terminate = ("--set", "pod.on_finish=terminate")
    shutil.copytree(trained, mounted / "workspace")
    (tmp_path / "workspace").symlink_to(mounted / "workspace")
    without = supervised(start, account, *SHORT, *terminate)
    assert goes_down(without, account) == 78
    assert "RUNPOD_VOLUME_ID is not set, so this pod has none" in without.output
    assert "this pod is stopped and not terminated" in without.output
    assert actions(account) == {"stop"}

    monkeypatch.setenv("RUNPOD_VOLUME_ID", "volume1")
    account.status = "RUNNING"
    refused = supervised(start, account, *terminate, "--set", "pod.max_hours=1e-9")
    assert goes_down(refused, account) == 69
    assert actions(account) == {"stop"}

    account.status = "RUNNING"
    finished = supervised(start, account, *SHORT, *terminate)
    assert goes_down(finished, account, "TERMINATED") == 0
    assert actions(account) == {"stop", "terminate"}


@pytest.fixture
def mounted() -> Iterator[Path]:
    """A folder on a mounted file system that is not the root."""
    folder = Path("/dev/shm/hybrid_vit_cascade_test_money")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_a_container_that_cannot_start_is_stopped_too(
    start: Callable[..., Container], account: RunPod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong variable: nothing runs, and nothing is paid for after the grace period."""
    monkeypatch.setenv("LOG_LEVEL", "LOUD")
    program = ("tests.on_pod", json.dumps({"api": account.url, "grace_minutes": 0.001}))
    container = start(program=program)
    container.says("nothing runs here, because the container could not start; this pod is stopped in 0.001 minutes")
    container.until(lambda: account.status == "EXITED")
    assert container.stop()[0] == 143
