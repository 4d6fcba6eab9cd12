"""The doctor's questions to Weights & Biases and RunPod, against real local servers."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from app.config_pod import PodConfig
from app.doctor import services
from app.doctor.finding import Finding, Verdict
from app.env import Environment
from tests.http_server import Quiet, serving
from tests.runpod_server import KEY, POD, runpod

WANDB = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def wandb_server(code: int = 200, answer: object = None) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that knows the key WANDB; with another code it answers that. Its address, and what was asked."""
    asked: list[dict[str, str]] = []

    class Handler(Quiet):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, **body, "login": self.headers["Authorization"]})
            known = base64.b64decode(self.headers["Authorization"].split()[1]).decode() == f"api:{WANDB}"
            data = json.dumps(answer or {"data": {"viewer": {"id": "u1"} if known else None}}).encode()
            self.send_response(code if known or code != 200 else 401)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with serving(Handler) as address:
        yield address, asked


def closed_port() -> int:
    """A port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("environ", "expected", "words"),
    [
        ({}, Verdict.PASS, "off (no WANDB_API_KEY)"),
        ({"WANDB_API_KEY": WANDB, "WANDB_MODE": "disabled"}, Verdict.PASS, "off (WANDB_MODE=disabled)"),
        ({"WANDB_MODE": "offline"}, Verdict.PASS, "offline"),
        ({"WANDB_MODE": "online"}, Verdict.WARN, "there is no WANDB_API_KEY"),
        ({"WANDB_API_KEY": "{{ RUNPOD_SECRET_wandb }}"}, Verdict.PASS, "off"),
        ({"WANDB_API_KEY": WANDB}, Verdict.PASS, "form of a key (40 characters)"),
        ({"WANDB_API_KEY": f"local-{WANDB}"}, Verdict.PASS, "form of a key"),
        ({"WANDB_API_KEY": "wandb_v1_" + 77 * "a"}, Verdict.PASS, "form of a key (86 characters)"),
        ({"WANDB_API_KEY": WANDB[:-1]}, Verdict.WARN, "has 39 characters and does not look like a key"),
        ({"WANDB_API_KEY": f'"{WANDB}"'}, Verdict.WARN, "has 42 characters and does not look like a key"),
    ],
)
def test_a_key_of_weights_and_biases_by_its_form(environ: dict[str, str], expected: Verdict, words: str) -> None:
    """Only its length is told."""
    finding = services.wandb_key(Environment.read(environ))
    assert (finding.verdict, words in finding.found) == (expected, True), finding.found
    assert WANDB[:-1] not in finding.found + finding.what_to_do


def reach(base: str, key: str = WANDB) -> Finding:
    """The check with this key."""
    finding = services.wandb_reach(Environment.read({"WANDB_API_KEY": key}), base)
    assert finding is not None
    return finding


def test_weights_and_biases_is_asked_once_who_the_key_is() -> None:
    """By the login that its own client uses."""
    with wandb_server() as (base, asked):
        assert reach(base).verdict is Verdict.PASS
    (question,) = asked
    assert (question["path"], question["query"]) == ("/graphql", "query{viewer{id}}")


@pytest.mark.parametrize("code", [200, 401, 403])
def test_a_key_that_weights_and_biases_refuses(code: int) -> None:
    """By a 401 of its own, by any other refusal; it trains, so it is a warning, with what to do."""
    with wandb_server(code) as (base, _):
        finding = reach(base, WANDB[::-1])
    assert (finding.verdict, "the key is not accepted" in finding.found) == (Verdict.WARN, True)
    assert "Copy the key anew" in finding.what_to_do


def test_an_answer_without_a_user() -> None:
    """Status 200 and nobody: not accepted either."""
    with wandb_server(answer={"data": {"viewer": None}}) as (base, _):
        finding = reach(base)
    assert (finding.verdict, "knows no user with this key" in finding.found) == (Verdict.WARN, True)


@pytest.mark.parametrize(("code", "answer"), [(503, None), (200, ["no object"])])
def test_a_server_with_troubles_of_its_own(code: int, answer: object) -> None:
    """Nothing to be put right here."""
    with wandb_server(code, answer) as (base, _):
        finding = reach(base)
    assert (finding.verdict, "TensorBoard has them all" in finding.what_to_do) == (Verdict.WARN, True)


def test_without_a_network() -> None:
    """Nobody listens."""
    finding = reach(f"http://127.0.0.1:{closed_port()}")
    assert (finding.verdict, "Connection refused" in finding.found) == (Verdict.WARN, True)


@pytest.mark.parametrize("environ", [{}, {"WANDB_MODE": "offline"}, {"WANDB_API_KEY": WANDB, "WANDB_MODE": "disabled"}])
def test_without_use_for_it_weights_and_biases_is_not_asked(environ: dict[str, str]) -> None:
    """No request where nothing would be sent."""
    assert services.wandb_reach(Environment.read(environ), "http://127.0.0.1:1") is None


def of_pod(base: str, key: str = KEY, on_finish: str = "auto", pod: str = POD) -> Finding | None:
    """The check on a pod."""
    environ = {"RUNPOD_POD_ID": pod, "RUNPOD_API_KEY": key}
    return services.runpod(Environment.read(environ), PodConfig.model_validate({"on_finish": on_finish}), base)


def test_the_pod_s_key_is_tried_by_one_question() -> None:
    """It looks at the pod, and changes nothing."""
    with runpod() as account:
        finding = of_pod(account.url)
    assert finding is not None
    assert (finding.verdict, "RUNNING, 0.44 USD/h" in finding.found) == (Verdict.PASS, True)
    assert account.paths() == ["/graphql"]
    assert account.status == "RUNNING"


@pytest.mark.parametrize(("on_finish", "expected"), [("auto", Verdict.WARN), ("stop", Verdict.FAIL)])
@pytest.mark.parametrize("key", ["", "rpa_wrong"])
def test_a_pod_that_cannot_stop_itself(key: str, on_finish: str, expected: Verdict) -> None:
    """No key, or one that is answered with 401: a failure where the stop was asked for in so many words."""
    with runpod() as account:
        finding = of_pod(account.url, key, on_finish)
    assert finding is not None
    assert (finding.verdict, "this pod cannot stop itself" in finding.found) == (expected, True)
    assert ("answered 401" in finding.found) == bool(key)
    assert "rpa_wrong" not in finding.found
    assert "Settings, API keys" in finding.what_to_do


def test_runpod_is_asked_once_and_not_again() -> None:
    """A server in trouble, a pod of another account, nobody at all: a warning without a second try."""
    with runpod() as account:
        account.faults["/graphql"] = [503]
        troubled, other = of_pod(account.url), of_pod(account.url, pod="other")
        assert len(account.requests) == 2
    nobody = of_pod(f"http://127.0.0.1:{closed_port()}")
    for finding, words in ((troubled, "503"), (other, "refused"), (nobody, "no answer")):
        assert finding is not None
        assert (finding.verdict, words in finding.found) == (Verdict.WARN, True), finding.found


def test_runpod_is_asked_only_where_the_pod_would_be_stopped() -> None:
    """Not at a desk, and not where it is kept."""
    assert of_pod("http://127.0.0.1:1", on_finish="keep") is None
    desk = Environment.read({"RUNPOD_API_KEY": KEY})
    assert services.runpod(desk, PodConfig(), "http://127.0.0.1:1") is None
