"""The page for phones, over run folders as the trainer leaves them."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from werkzeug.test import Client, TestResponse
from werkzeug.wrappers import Request, Response

from app.ops.dashboard_status import StatusPages
from app.workspace import RunDir, Workspace

FIELDS: dict[str, Any] = {
    "state": "training",
    "stage": "stage_32",
    "epoch": 3,
    "epochs": 10,
    "step": 412,
    "steps": 1280,
    "loss": 0.01234,
    "val_loss": 0.02,
    "best_val_loss": 0.019,
    "stage_eta_s": 3700.0,
    "checkpoint": 400,
    "checkpoint_file": "stage_32_last.pt",
}


def add_run(workspace: Workspace, name: str | None, seconds_ago: float = 0.0, **fields: Any) -> RunDir:
    """A run folder with a status of that age and a picture."""
    run_dir = workspace.run_dir(name)
    run_dir.ensure()
    run_dir.status.write_text(json.dumps({**FIELDS, "time": time.time() - seconds_ago, **fields}))
    Image.new("RGB", (32, 18), "white").save(run_dir.progress_png)
    return run_dir


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty one."""
    workspace = Workspace(tmp_path)
    workspace.checkpoints.mkdir(parents=True)
    return workspace


def get(workspace: Workspace, path: str = "/status", **headers: str) -> TestResponse:
    """The answer at a path; 418 where the page is left to TensorBoard."""

    @Request.application
    def pages(request: Request) -> Response:
        return StatusPages(workspace).answer(request) or Response(status=418)

    return Client(pages).get(path, headers=headers)


def test_the_page_says_what_the_status_command_says(workspace: Workspace) -> None:
    """For each run, newest first, with its picture, made for a narrow screen and fresh by itself."""
    old, new = add_run(workspace, None), add_run(workspace, "second-run", stage="stage_64")
    os.utime(new.status, (time.time() + 10, time.time() + 10))
    answer = get(workspace)
    page = answer.text
    assert answer.content_type == "text/html; charset=utf-8"
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert '<meta http-equiv="refresh"' in page
    assert page.index("<h2>second-run</h2>") < page.index("<h2>run without a name</h2>")
    plain = " ".join(page.split())
    for words in (
        "state training, updated 0 s ago",
        "epoch 3 of 10 completed",
        "step 412 of 1280",
        "ends in 1 h 01 min",
    ):
        assert plain.count(words) == 2, words
    assert "stage stage_64" in plain
    assert str(old.path) in page
    assert '<img src="/status/second-run/progress.png"' in page
    assert '<img src="/status/progress.png"' in page
    assert '<a href="/">TensorBoard</a>' in page
    assert get(workspace, "/status/").text == page


def test_everything_from_a_run_is_escaped(workspace: Workspace) -> None:
    """A checkpoint folder may come from somebody else."""
    add_run(workspace, None, state="<script>alert(1)</script>")
    folder = RunDir(workspace.checkpoints / '"><img src=x onerror=alert(2)>')
    folder.ensure()
    folder.status.write_text("{}")
    folder.progress_png.write_bytes(b"x")
    answer = get(workspace)
    assert "<script" not in answer.text
    assert "<img src=x" not in answer.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in answer.text
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; img-src 'self'; style-src")
    assert "script-src" not in answer.headers["Content-Security-Policy"]


def test_before_the_first_run_the_page_says_so(workspace: Workspace, tmp_path: Path) -> None:
    """With an empty folder and without one."""
    assert "No run has started yet." in get(workspace).text
    assert "No run has started yet." in get(Workspace(tmp_path / "nothing")).text


def test_why_a_run_was_refused_is_shown(workspace: Workspace) -> None:
    """Of a run that never began, too."""
    workspace.run_dir(None).reason.write_text("exit code 78\nconfig.yaml line 3: unknown key\n")
    page = get(workspace).text
    assert "REASON  exit code 78\nconfig.yaml line 3: unknown key" in page
    assert "No picture yet." in page
    add_run(workspace, "other").reason.write_text("exit code 69\nno GPU\n")
    assert "REASON         exit code 69\nno GPU" in get(workspace).text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "status.json: cannot be read: "),
        ("[]", "status.json: cannot be understood (TypeError: "),
        ('{"state": "training"}', "status.json: cannot be understood (KeyError: &#x27;time&#x27;)"),
        ('{"time": "x"}', "status.json: cannot be understood (TypeError: "),
    ],
)
def test_a_broken_status_does_not_hide_the_others(workspace: Workspace, text: str, message: str) -> None:
    """The section says what is wrong with which file."""
    add_run(workspace, "good")
    add_run(workspace, "broken").status.write_text(text)
    page = get(workspace).text
    assert message in page
    assert "412 of 1280" in page


def test_the_picture_is_the_file(workspace: Workspace) -> None:
    """With a tag, so that a page that refreshes itself loads it only when it has changed."""
    run_dir = add_run(workspace, "demo")
    add_run(workspace, None)
    answer = get(workspace, "/status/demo/progress.png")
    assert (answer.status_code, answer.content_type) == (200, "image/png")
    assert answer.data == run_dir.progress_png.read_bytes()
    etag = answer.headers["ETag"]
    assert get(workspace, "/status/demo/progress.png", **{"If-None-Match": etag}).status_code == 304
    Image.new("RGB", (32, 18), "black").save(run_dir.progress_png)
    assert get(workspace, "/status/demo/progress.png", **{"If-None-Match": etag}).status_code == 200
    assert get(workspace, "/status/progress.png").status_code == 200


def test_a_missing_picture_is_no_error(workspace: Workspace) -> None:
    """404 in words."""
    answer = get(workspace, "/status/nothing/progress.png")
    assert (answer.status_code, answer.text) == (404, "There is no picture of this run yet.\n")


@pytest.mark.parametrize(
    "path",
    [
        "/status/../progress.png",
        "/status/..%2F..%2Fdata/progress.png",
        "/status/demo/stage_64_last.pt",
        "/status/demo/../demo/progress.png",
        "/status//progress.png",
        "/status/demo%00/progress.png",
        "/status/demo/progress.png/",
        "/statuses",
        "/",
    ],
)
def test_no_other_file_can_be_named(workspace: Workspace, path: str) -> None:
    """Only a run's name fits into the address."""
    add_run(workspace, "demo")
    (workspace.root / "progress.png").write_bytes(b"outside")
    assert get(workspace, path).status_code in (404, 418)
    assert b"outside" not in get(workspace, path).data
