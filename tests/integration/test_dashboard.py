"""The dashboard as a real process over real event files: who gets in, what is shown, what is logged, how it ends."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from http.cookies import SimpleCookie
from pathlib import Path

import pytest
from PIL import Image

from app.workspace import Workspace
from tests.conftest import ROOT
from tests.dashboard_process import EPOCHS, STAGES, Dashboard, add_run, basic, loss

PASSWORD = "correct horse battery staple"
RIGHT = basic(PASSWORD)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two runs, one of them without a name."""
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    add_run(workspace, None)
    add_run(workspace, "demo")
    return workspace


@pytest.fixture(scope="module")
def board(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """One that listens on all addresses with a password."""
    variables = {"DASHBOARD_PASSWORD": PASSWORD, "DASHBOARD_HOST": "0.0.0.0"}
    with Dashboard(tmp_path_factory.mktemp("board"), workspace, **variables) as board:
        board.wait_until_ready()
        yield board


def test_without_the_password_nothing_is_shown(board: Dashboard) -> None:
    """401 for pages, data and paths that do not exist; the server does not say what it is."""
    for path in (
        "/",
        "/index.html",
        "/data/runs",
        "/data/plugin/scalars/tags",
        "/status",
        "/nothing",
        "//",
        "/%2e%2e/",
    ):
        answer = board.get(path)
        assert answer.status == 401, path
        assert "stage_16" not in answer.body.decode()
        assert answer.headers["Server"] == "dashboard"


def test_health_is_open_and_has_no_data(board: Dashboard) -> None:
    """A fixed text, and nothing else starts with its path."""
    assert (board.get("/healthz").status, board.get("/healthz").body) == (200, b'{"status": "ok"}')
    assert board.get("/healthz/").status == 401


def test_tensorboard_shows_all_runs_with_the_password(board: Dashboard) -> None:
    """The page itself, the runs below `checkpoints/`, and the very values that were logged."""
    page = board.get("/", RIGHT)
    assert (page.status, b"<tb-webapp" in page.body) == (200, True)
    assert sorted(board.get("/data/runs", RIGHT).json) == ["demo/tensorboard", "tensorboard"]
    for stage in STAGES:
        query = urllib.parse.urlencode({"run": "demo/tensorboard", "tag": f"{stage}/val_loss"})
        points = board.get(f"/data/plugin/scalars/scalars?{query}", RIGHT).json
        assert [(step, value) for _, step, value in points] == [(step, loss(stage, step)) for step in range(EPOCHS)]


def test_all_pictures_are_kept(board: Dashboard) -> None:
    """By its own choice TensorBoard would keep 10 of the 30."""
    query = urllib.parse.urlencode({"run": "demo/tensorboard", "tag": "stage_16/pictures/3fa2", "sample": 0})
    images = board.get(f"/data/plugin/images/images?{query}", RIGHT).json
    assert [image["step"] for image in images] == list(range(EPOCHS))
    picture = board.get(f"/data/plugin/images/individualImage?{images[-1]['query']}", RIGHT)
    assert (picture.status, picture.body[:8]) == (200, b"\x89PNG\r\n\x1a\n")


def test_the_projector_is_not_there(board: Dashboard) -> None:
    """Neither listed nor answered: it reads files by name."""
    plugins = board.get("/data/plugins_listing", RIGHT).json
    assert "projector" not in plugins
    assert {"scalars", "timeseries", "custom_scalars", "images", "text"} <= set(plugins)
    for route in ("runs", "info", "tensor", "metadata"):
        assert board.get(f"/data/plugin/projector/{route}?run=demo&name=x", RIGHT).status == 404


def test_a_token_opens_the_browser_for_good(board: Dashboard) -> None:
    """Redirected to the address without it; the cookie opens everything; it is Secure behind RunPod's proxy."""
    token = urllib.parse.quote(PASSWORD)
    answer = board.get(f"/?token={token}&x=1", {"X-Forwarded-Proto": "https"})
    assert (answer.status, answer.headers["Location"]) == (303, "/?x=1")
    (cookie,) = SimpleCookie(answer.headers["Set-Cookie"]).values()
    assert (cookie["httponly"], cookie["secure"], cookie["samesite"]) == (True, True, "Lax")
    for path in ("/", "/status", "/data/runs"):
        assert board.get(path, {"Cookie": f"{cookie.key}={cookie.value}"}).status == 200
        assert board.get(path, {"Cookie": f"{cookie.key}={cookie.value[:-1]}"}).status == 401


def test_guessing_is_slow_and_keeps_nobody_out(board: Dashboard) -> None:
    """A wrong password waits two seconds; many at once are refused unseen; health and the right one go on meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        guesses = [
            pool.submit(board.get, "/", {**basic(f"guess{i}"), "X-Forwarded-For": f"198.51.100.{i // 4}"})
            for i in range(24)
        ]
        time.sleep(0.5)
        meanwhile = [board.get("/status", RIGHT), board.get("/healthz")]
        answers = [guess.result() for guess in guesses]
    assert [answer.status for answer in meanwhile] == [200, 200]
    assert max(answer.seconds for answer in meanwhile) < 1
    waited = [answer for answer in answers if answer.status == 401]
    assert len(waited) == 12
    assert min(answer.seconds for answer in waited) >= 2
    assert {answer.status for answer in answers if answer.seconds < 2} == {429}


def test_status_shows_words_and_picture_of_each_run(board: Dashboard, workspace: Workspace, tmp_path: Path) -> None:
    """The PNG is the trainer's own."""
    page = board.get("/status", RIGHT).body.decode()
    assert page.count("finished, updated") == 2
    assert page.count("60 of 60") == 2
    (tmp_path / "picture.png").write_bytes(board.get("/status/demo/progress.png", RIGHT).body)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (160, 90)
    assert board.get("/status/demo/progress.png").status == 401


def test_a_run_that_begins_later_appears(board: Dashboard, workspace: Workspace) -> None:
    """Within the reload interval of five seconds, and a little."""
    add_run(workspace, "later")
    deadline = time.monotonic() + 15
    while "later/tensorboard" not in board.get("/data/runs", RIGHT).json and time.monotonic() < deadline:
        time.sleep(0.2)
    assert "later/tensorboard" in board.get("/data/runs", RIGHT).json
    assert "<h2>later</h2>" in board.get("/status", RIGHT).body.decode()


def test_the_log_has_no_queries_and_no_passwords(board: Dashboard) -> None:
    """Not of good requests, wrong ones, missing pages, broken request lines or broken parameters."""
    secret = "patient-in-the-query"
    query = f"run={secret}&tag={secret}&blob_key={secret}&name={secret}"
    for path in ("/", "/data/runs", "/nothing", "/status", "/status/no/progress.png", "/data/plugin_entry.html"):
        board.get(f"{path}?{query}", RIGHT)
    for route in ("scalars/scalars", "images/individualImage", "hparams/experiment", "custom_scalars/scalars"):
        board.get(f"/data/plugin/{route}?{query}", RIGHT)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        wrong = [pool.submit(board.get, f"/?token={secret}"), pool.submit(board.get, "/", basic(secret))]
        assert [guess.result().status for guess in wrong] == [401, 401]
    board.get(f"/data/plugin/timeseries/timeSeries?x={secret}", RIGHT, method="POST", body=secret.encode())
    for line in (f"GET /?token={secret}\x01 HTTP/9.9\r\n\r\n", f"{secret}\r\n\r\n", f"GET /?{secret} x y\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", board.port), timeout=5) as raw:
            raw.sendall(line.encode())
            raw.recv(1000)
    assert board.get("/healthz").status == 200
    for text in (secret, PASSWORD, "guess1", "token=", "Traceback"):
        assert text not in board.log, text


def test_without_a_password_only_local_names_are_answered(workspace: Workspace, tmp_path: Path) -> None:
    """As compose and scripts/up start it: on all addresses of a container that publishes to loopback."""
    variables = {"DASHBOARD_AUTH": "none", "DASHBOARD_HOST": "0.0.0.0"}
    with Dashboard(tmp_path, workspace, **variables) as board:
        board.wait_until_ready()
        assert board.get("/data/runs").status == 200
        assert board.get("/status", {"Host": "localhost:9999"}).status == 200
        for host in ("evil.example", f"evil.example:{board.port}", "abc-6006.proxy.runpod.net"):
            assert board.get("/data/runs", {"Host": host}).status == 403
        assert board.get("/healthz", {"Host": "evil.example"}).status == 200


def test_a_generated_password_outlives_a_restart_of_the_dashboard(workspace: Workspace, tmp_path: Path) -> None:
    """Printed once with the address that logs in, and nowhere in the workspace; a placeholder is no password."""
    variables = {"DASHBOARD_PASSWORD": "{{ RUNPOD_SECRET_dashboard }}", "DASHBOARD_HOST": "0.0.0.0"}
    with Dashboard(tmp_path, workspace, **variables) as board:
        board.wait_until_ready()
        password = board.log.partition("/?token=")[2].split()[0]
        assert board.get("/").status == 401
        assert board.get("/", basic("{{ RUNPOD_SECRET_dashboard }}")).status == 401
        assert board.get("/", basic(password)).status == 200
        assert "DASHBOARD_PASSWORD holds the unresolved placeholder" in board.log
    with Dashboard(tmp_path, workspace, **variables) as board:
        board.wait_until_ready()
        assert board.get("/", basic(password)).status == 200
        assert password not in board.log
    written = [path for path in workspace.root.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
    assert written == []


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_sigterm_ends_it_at_once_and_leaves_nothing(workspace: Workspace, tmp_path: Path) -> None:
    """Code 0, in the middle of a request too; its data server goes with it; SIGTERM while loading is the same."""
    with Dashboard(tmp_path, workspace, DASHBOARD_PASSWORD=PASSWORD) as board:
        board.wait_until_ready()
        (child,) = board.children
        with (
            socket.create_connection(("127.0.0.1", board.port)) as idle,
            concurrent.futures.ThreadPoolExecutor(1) as pool,
        ):
            idle.sendall(b"GET / HTTP/1.1\r\n")
            guess = pool.submit(board.get, "/", basic("wrong"))
            time.sleep(0.3)
            code, seconds = board.terminate()
            assert isinstance(guess.exception(), Exception)
        assert code == 0
        assert seconds < 1.5
        deadline = time.monotonic() + 5
        while is_alive(child) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_alive(child)
    with Dashboard(tmp_path, workspace, DASHBOARD_PASSWORD=PASSWORD) as board:
        while "dashboard on port" not in board.log:
            time.sleep(0.01)
        assert board.terminate()[0] == 0


def test_a_data_server_that_dies_ends_the_dashboard(workspace: Workspace, tmp_path: Path) -> None:
    """So that supervisord starts it again; health fails before."""
    with Dashboard(tmp_path, workspace, DASHBOARD_PASSWORD=PASSWORD) as board:
        board.wait_until_ready()
        (child,) = board.children
        os.kill(child, signal.SIGKILL)
        assert board.process.wait(30) == 69
        assert "TensorBoard did not start or answers no more; the lines above say why" in board.log


@pytest.mark.parametrize("taken", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_an_error_and_no_other_is_tried(workspace: Workspace, tmp_path: Path, taken: str) -> None:
    """Exit code 69 at once, naming the port and what to do."""
    with socket.create_server((taken, 0)) as other:
        port = other.getsockname()[1]
        variables = {"DASHBOARD_PASSWORD": PASSWORD, "DASHBOARD_HOST": "0.0.0.0"}
        with Dashboard(tmp_path, workspace, port, **variables) as board:
            assert board.process.wait(20) == 69
            text = f"port {port} of 0.0.0.0 is taken: stop what listens there, or choose another one with PORT"
            assert text in board.log


def test_an_address_of_another_machine_is_an_error(workspace: Workspace, tmp_path: Path) -> None:
    """192.0.2.1 is nobody's."""
    with Dashboard(tmp_path, workspace, DASHBOARD_PASSWORD=PASSWORD, DASHBOARD_HOST="192.0.2.1") as board:
        assert board.process.wait(20) == 69
        assert "of 192.0.2.1: Cannot assign requested address. DASHBOARD_HOST must be an address of this" in board.log


def test_ctrl_c_is_like_sigterm(workspace: Workspace, tmp_path: Path) -> None:
    """Without a traceback."""
    with Dashboard(tmp_path, workspace, DASHBOARD_PASSWORD=PASSWORD) as board:
        board.wait_until_ready()
        board.process.send_signal(signal.SIGINT)
        assert board.process.wait(5) == 0
        assert "Traceback" not in board.log


def test_the_command_has_help() -> None:
    """Address and password are in the environment."""
    done = subprocess.run(
        [sys.executable, "-m", "app", "dashboard", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "Serve TensorBoard over all runs, and /status, behind a password." in done.stdout
