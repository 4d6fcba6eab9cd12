"""Claims about RunPod's API, against a real local server that speaks its documented schema."""

import json
import logging
import re
import socket
import subprocess
from pathlib import Path

import pytest

from app.config_pod import PodConfig
from app.env import Environment, Secret
from app.errors import ConfigError
from app.ops.pod import PodError, RunPodApi, api_of, check_ending, stop_this_pod, stops_pod
from app.ops.runpod import create_template, pin_image, read_template, watch
from tests.conftest import ROOT
from tests.runpod_server import KEY, POD, runpod

TEMPLATE = ROOT / "docker/runpod-template.json"
ACTION = f"/v2/pods/{POD}/action"
V2_FIELDS = {"name", "image", "args", "disk", "env", "ports", "mounts", "readme", "allowedCudaVersions"}
"""Fields of a template in the API's version 2."""
DIGEST = f"registry.example/ct@sha256:{'0123456789abcdef' * 4}"


@pytest.fixture
def account():
    """A RunPod account with a running pod."""
    with runpod() as state:
        yield state


@pytest.fixture
def pauses():
    """Seconds that the client wanted to wait."""
    return []


@pytest.fixture
def api(account, pauses):
    """The client under test."""
    return RunPodApi(Secret(KEY), account.url, pauses.append)


def test_a_pod_is_stopped_through_version_2(account, api):
    """One request with the key in its header, and the pod is down."""
    assert api.stop_pod(POD) == "API v2"
    assert account.status == "EXITED"
    assert account.requests == [(ACTION, {"action": "stop"})]


@pytest.mark.parametrize("code", [409, 429, 500, 503])
def test_what_may_pass_is_tried_again(account, api, pauses, code):
    """A pod that is changing its state, too many requests, their own errors: with growing pauses."""
    account.faults[ACTION] = [code, code]
    assert api.stop_pod(POD) == "API v2"
    assert account.status == "EXITED"
    assert pauses == [2, 4]


def test_the_server_says_how_long_to_wait(account, api, pauses):
    """Retry-After of a 429, up to a minute."""
    account.faults[ACTION], account.retry_after = [429], "7"
    api.stop_pod(POD)
    assert pauses == [7]
    account.faults[ACTION], account.retry_after = [429], "86400"
    api.stop_pod(POD)
    assert pauses == [7, 60]


@pytest.mark.parametrize("faults", [[404], [403], [500] * 9, ["<html>"]])
def test_graphql_is_the_second_way(account, api, faults):
    """Whatever version 2 answers."""
    account.faults[ACTION] = faults
    assert api.stop_pod(POD) == "GraphQL"
    assert account.status == "EXITED"
    assert account.paths()[-1] == "/graphql"


def test_both_ways_closed_is_an_error_that_says_both(account, api, caplog):
    """No exception but PodError, no more than four tries each."""
    account.faults = {ACTION: [503] * 9, "/graphql": [503] * 9}
    with pytest.raises(PodError, match="/graphql: 503 Service Unavailable"):
        api.stop_pod(POD)
    assert account.paths() == [ACTION] * 4 + ["/graphql"] * 4
    assert f"{ACTION}: 503" in caplog.text


def test_graphql_errors_come_with_code_200(account, api):
    """They are errors all the same."""
    account.faults = {ACTION: [403], "/graphql": [json.dumps({"errors": [{"message": "not yours"}], "data": None})]}
    with pytest.raises(PodError, match=r"/graphql refused: .*not yours"):
        api.stop_pod(POD)


def test_a_server_that_is_away_is_an_error(pauses):
    """Connection refused, on both ways."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(PodError, match=r"no answer: .*refused"):
        RunPodApi(Secret(KEY), gone, pauses.append).stop_pod(POD)
    assert len(pauses) == 6


def test_the_key_is_in_no_message(account, caplog):
    """Nor in any address."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(PodError) as caught:
        RunPodApi(Secret("rpa_wrong_key"), account.url, lambda _: None).stop_pod(POD)
    assert "401" in str(caught.value)
    assert "rpa_wrong_key" not in f"{caught.value}{caplog.text}{account.requests}"


def test_a_pod_id_cannot_carry_a_query(api):
    """It goes into an address and into a query."""
    with pytest.raises(PodError, match="expected letters, digits"):
        api.stop_pod('x"}){id}}#')


def test_without_a_key_the_message_says_where_it_comes_from():
    """The scripts at a desk."""
    with pytest.raises(PodError, match="RUNPOD_API_KEY is not set"):
        api_of(Environment.read({}))


@pytest.mark.parametrize(
    ("on_finish", "pod_id", "stops"),
    [
        ("terminate", POD, True),
        ("auto", POD, True),
        ("auto", None, False),
        ("keep", POD, False),
        ("stop", POD, True),
        ("stop", None, False),
    ],
)
def test_when_a_pod_is_stopped(on_finish, pod_id, stops):
    """By default on a pod and nowhere else."""
    assert stops_pod(PodConfig(on_finish=on_finish), pod_id) is stops


class Clock:
    """A wish to stop whose sleeps pass at once; the pod goes down some time after it was told to."""

    def __init__(self, account, sleeps_until_down):
        self.account, self.left, self.sleeps = account, sleeps_until_down, []

    def __call__(self):
        return self.left == 0

    def wait(self, seconds):
        self.sleeps.append(seconds)
        if self.account.status == "EXITED":
            self.left -= 1


def stop_it(account, clock, pod=None, key=KEY, **options):
    """As the end of a run does."""
    secret = None if key is None else Secret(key)
    stop_this_pod(pod or PodConfig(), POD, secret, clock, base=account.url, **options)


def test_the_end_of_a_run_stops_its_pod_after_the_grace_period(account, caplog):
    """The dashboard has its half hour; and while the pod is still there, it is asked again."""
    caplog.set_level(logging.INFO)
    clock, told = Clock(account, sleeps_until_down=2), []
    stop_it(account, clock, announce=told.append)
    assert told == ["the run has ended; this pod is stopped in 30 minutes"]
    assert account.requests == [(ACTION, {"action": "stop"})] * 2
    assert clock.sleeps == [1800, 300, 300]
    assert "this pod is stopped in 30 minutes. `pod.on_finish: keep` would leave it running" in caplog.text


def test_a_pod_that_cannot_be_stopped_is_a_loud_error_again_and_again(account, caplog):
    """Never the end of the process: one day the API answers. The webhook hears of it once an hour."""
    account.faults = {ACTION: [403] * 13, "/graphql": [403] * 13}
    alarms = []
    stop_it(account, Clock(account, sleeps_until_down=1), PodConfig(grace_minutes=0), alarm=alarms.append)
    said = "THIS POD COULD NOT BE STOPPED AND COSTS MONEY: stop or terminate it in the console"
    assert caplog.text.count(f"{said}. The run's files are safe. Trying again in 300 s") == 13
    assert alarms == [said, said]
    assert account.status == "EXITED"


def test_without_a_key_the_pod_says_so(account, caplog):
    """Until somebody stops it by hand."""
    clock = Clock(account, sleeps_until_down=1)
    account.status = "EXITED"
    stop_it(account, clock, PodConfig(grace_minutes=1), key=None)
    assert account.requests == []
    account.status, clock.left = "EXITED", 2
    stop_it(account, clock, key=None)
    assert "RUNPOD_API_KEY is not set" in caplog.text


@pytest.mark.parametrize(("faults", "through"), [([], "API v2"), ([404], "GraphQL")])
def test_a_pod_is_terminated_only_by_that_word(account, api, faults, through):
    """Through version 2, or through GraphQL, which answers with nothing."""
    account.faults[ACTION] = list(faults)
    assert api.terminate_pod(POD) == through
    assert account.status == "TERMINATED"
    assert account.requests[0] == (ACTION, {"action": "terminate"})


def test_graphql_s_refusal_to_terminate_is_an_error(account, api):
    """Nothing as an answer is not the same as an error."""
    account.faults = {ACTION: [403], "/graphql": [json.dumps({"errors": [{"message": "not yours"}], "data": None})]}
    with pytest.raises(PodError, match=r"/graphql refused: .*not yours"):
        api.terminate_pod(POD)


def test_elsewhere_the_log_says_what_would_be_done(caplog):
    """Quietly where nothing else was asked for; not at all where a pod would be kept."""
    caplog.set_level(logging.INFO)
    assert not stops_pod(PodConfig(on_finish="keep"), None)
    assert caplog.text == ""
    assert not stops_pod(PodConfig(), None)
    assert not stops_pod(PodConfig(on_finish="terminate", grace_minutes=5), None)
    quiet, loud = caplog.records
    assert (quiet.levelname, loud.levelname) == ("INFO", "WARNING")
    assert "On a pod, the checkpoints would be verified and the pod stopped after 30 minutes" in quiet.getMessage()
    assert "On a pod, the checkpoints would be verified and the pod terminated after 5 minutes" in loud.getMessage()


def test_only_a_pod_with_its_work_on_a_network_volume_may_be_terminated():
    """Refused at the start, when nothing is lost: /dev/shm is mounted, / is not."""
    terminate = PodConfig(on_finish="terminate")
    with pytest.raises(ConfigError, match=r"RUNPOD_VOLUME_ID is not set.*use pod.on_finish: stop"):
        check_ending(terminate, Environment.read({"RUNPOD_POD_ID": POD, "WORKSPACE": "/dev/shm"}))
    with pytest.raises(ConfigError, match=r"but / is no mounted volume\. Set WORKSPACE"):
        check_ending(terminate, Environment.read({"RUNPOD_POD_ID": POD, "RUNPOD_VOLUME_ID": "v1", "WORKSPACE": "/"}))
    check_ending(
        terminate, Environment.read({"RUNPOD_POD_ID": POD, "RUNPOD_VOLUME_ID": "v1", "WORKSPACE": "/dev/shm/work"})
    )
    check_ending(terminate, Environment.read({}))
    check_ending(PodConfig(on_finish="stop"), Environment.read({"RUNPOD_POD_ID": POD}))


def test_watch_starts_an_exited_pod_and_counts(account, api, tmp_path):
    """Up to the limit, over several calls; a running pod is left alone."""
    ledger = tmp_path / "state/watch.jsonl"
    assert watch(api, POD, 2, 0.5, ledger) == f"pod {POD} is RUNNING: nothing to do"
    for number in (1, 2):
        account.status = "EXITED"
        assert watch(api, POD, 2, 0.5, ledger) == f"pod {POD} was EXITED and is started: start {number} of at most 2"
        assert account.status == "RUNNING"
    account.status = "EXITED"
    with pytest.raises(PodError, match="it was started 2 times, the limit is 2"):
        watch(api, POD, 2, 0.5, ledger)
    assert account.status == "EXITED"


@pytest.mark.parametrize(("price", "shown"), [(0.51, "0.51 USD/h"), (None, "unknown"), (0.0, "unknown")])
def test_watch_does_not_start_a_pod_that_costs_too_much(account, api, tmp_path, price, shown):
    """Nor one whose price is not known."""
    account.status, account.usd_per_hour = "EXITED", price
    with pytest.raises(PodError, match=f"its price is {shown}, the limit 0.5 USD/h"):
        watch(api, POD, 2, 0.5, tmp_path / "watch.jsonl")
    assert account.status == "EXITED"


def test_a_start_that_failed_counts(account, api, tmp_path):
    """Else it could be repeated without end."""
    account.status, account.faults[ACTION] = "EXITED", [403]
    with pytest.raises(PodError, match="403"):
        watch(api, POD, 1, 0.5, tmp_path / "watch.jsonl")
    with pytest.raises(PodError, match="it was started 1 times"):
        watch(api, POD, 1, 0.5, tmp_path / "watch.jsonl")


def test_watch_of_an_unknown_pod_is_an_error(api, tmp_path):
    """A typing mistake, or another account."""
    with pytest.raises(PodError, match=r"/graphql refused|no such pod"):
        watch(api, "other", 1, 0.5, tmp_path / "watch.jsonl")


def test_the_template_has_the_fields_of_version_2():
    """And none besides; types and limits as documented."""
    template = read_template(TEMPLATE)
    assert set(template) == V2_FIELDS
    assert all(isinstance(template[name], str) for name in ("name", "image", "args", "readme"))
    assert isinstance(template["disk"], int)
    assert template["disk"] >= 1
    assert all(isinstance(value, str) for value in template["env"].values())
    assert len(template["env"]) <= 50
    assert template["ports"] == ["6006/http", "22/tcp"]
    assert set(template["mounts"]) == {"persistent"}
    assert set(template["mounts"]["persistent"]) == {"size", "path"}
    assert template["mounts"]["persistent"]["size"] >= 10
    assert template["mounts"]["persistent"]["path"] == "/workspace"
    assert all(re.fullmatch(r"\d+\.\d", each) for each in template["allowedCudaVersions"])


def test_the_template_s_variables_exist_and_its_config_too():
    """What a pod is told is what the application reads; an unresolved secret counts as unset."""
    variables = read_template(TEMPLATE)["env"]
    env = Environment.read(variables)
    assert set(variables) <= {name.upper() for name in Environment.__dataclass_fields__}
    assert (ROOT / str(env.config)).is_file()
    assert env.wandb_api_key is None
    assert env.notify_url is None
    assert len(env.warnings) == 3


def test_a_template_is_created_with_its_pinned_image(account, api, tmp_path):
    """Pinned by scripts/push, then posted as it stands in the file."""
    file = tmp_path / "template.json"
    file.write_bytes(TEMPLATE.read_bytes())
    with pytest.raises(ConfigError, match=r"expected IMAGE@sha256:DIGEST.*scripts/push writes it"):
        create_template(file, api)
    pin_image(file, DIGEST)
    assert create_template(file, api) == "tpl_1"
    assert account.templates == [{**read_template(TEMPLATE), "image": DIGEST}]


def test_a_refused_template_shows_the_answer(account, api, tmp_path):
    """The API says what it misses."""
    file = tmp_path / "template.json"
    file.write_text(json.dumps({"name": "", "image": DIGEST}))
    with pytest.raises(PodError, match=r"422 .*missing \['name'\]"):
        create_template(file, api)


@pytest.mark.parametrize("image", ["ct:latest", "ct@sha256:12", ""])
def test_only_a_digest_pins(tmp_path, image):
    """A tag may name something else tomorrow."""
    with pytest.raises(ConfigError, match="expected IMAGE@sha256:DIGEST"):
        pin_image(tmp_path / "template.json", image)


def test_a_template_file_that_is_none_is_named(tmp_path):
    """Missing, not JSON, not an object."""
    file = tmp_path / "template.json"
    with pytest.raises(ConfigError, match="No such file"):
        read_template(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_template(file)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="expected an object"):
        read_template(file)


def test_push_says_what_it_needs():
    """Without an image there is nothing to do."""
    done = subprocess.run([ROOT / "scripts/push"], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 2
    assert done.stderr == "error: expected one argument: scripts/push registry/name:tag\n"
    assert Path(ROOT / "scripts/push").stat().st_mode & 0o111
