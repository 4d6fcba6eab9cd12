"""What a person sees: the container's dashboard in headless Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from app.workspace import Workspace
from tests.chromium import Browser
from tests.container.engine import Container
from tests.dashboard_process import EPOCHS, STAGES, add_run, loss

PASSWORD = "correct horse battery staple"
CURVES = """(() => {
    const found = [];
    const walk = (root, title) => {
        for (const element of root.querySelectorAll("*")) {
            if (element.tagName === "TF-SCALAR-CARD") title = element.tag;
            if (element.matches("path.line")) found.push([title, element.getAttribute("d") || ""]);
            if (element.shadowRoot) walk(element.shadowRoot, title);
        }
    };
    walk(document, "");
    return found.filter(curve => curve[1].split("L").length > 1);
})()"""
"""Title of the chart and path of each curve that TensorBoard has drawn, through its shadow trees."""


@pytest.fixture(scope="module")
def url(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A container that serves the dashboard over a run whose values are known."""
    folder = tmp_path_factory.mktemp("seen")
    add_run(Workspace(folder), "demo")
    with Container("dashboard", workspace=folder, env={"DASHBOARD_PASSWORD": PASSWORD}) as container:
        container.wait_for(lambda: container.get("/healthz")[0] == 200, "/healthz")
        yield container.url


def test_without_the_password_there_is_nothing_to_see(url: str, tmp_path: Path) -> None:
    """401, three sentences that say where the password is, and no byte of TensorBoard."""
    for page in ("/", "/status", "/data/runs", "/?token=wrong"):
        with Browser(tmp_path / quote(page, safe="")) as browser:
            assert browser.open(url + page) == 401
            assert "It is the value of DASHBOARD_PASSWORD" in browser.evaluate("document.body.innerText")
            assert set(browser.statuses.values()) == {401}


def test_with_the_password_the_curves_are_drawn(url: str, tmp_path: Path) -> None:
    """The browser asks for it once; then each curve of the scalars page has the logged values, to a thousandth."""
    with Browser(tmp_path / "profile", PASSWORD) as browser:
        assert browser.open(f"{url}/#scalars") == 200
        curves = browser.wait_for(f"{CURVES}.length >= 8 && {CURVES}")
        browser.screenshot(tmp_path / "scalars.png")
        assert {status for status in browser.statuses.values() if status >= 400} == set()
    assert {title.rpartition("/")[0] for title, _ in curves} == set(STAGES)
    for stage in STAGES:
        assert any(falls_as_logged(points(path), stage) for title, path in curves if title.startswith(f"{stage}/")), (
            stage
        )
    with Image.open(tmp_path / "scalars.png") as picture:
        assert len(set(picture.convert("RGB").get_flattened_data())) > 500


def test_the_token_in_the_address_logs_in_and_leaves_it(url: str, tmp_path: Path) -> None:
    """The page then has no token in its address, none in its history, and no script can read the cookie."""
    with Browser(tmp_path / "profile") as browser:
        assert browser.open(f"{url}/?token={quote(PASSWORD)}#scalars") == 200
        assert "token" not in browser.evaluate("location.href")
        history = browser.call("Page.getNavigationHistory")["entries"]
        assert not any("token" in entry["url"] for entry in history)
        assert browser.evaluate("document.cookie") == ""
        browser.wait_for(f"{CURVES}.length >= 8")
        assert browser.open(f"{url}/status") == 200


def test_the_status_page_fits_a_phone(url: str, tmp_path: Path) -> None:
    """Nothing sticks out at 390 pixels, and the picture is as wide as the page."""
    with Browser(tmp_path / "profile", PASSWORD) as browser:
        browser.resize(390, 844, mobile=True)
        assert browser.open(f"{url}/status") == 200
        browser.wait_for("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert browser.evaluate("document.images.length") == 1
        assert browser.evaluate("document.documentElement.scrollWidth") == 390
        assert browser.evaluate("document.images[0].clientWidth") > 350
        assert "60 of 60" in browser.evaluate("document.body.innerText")


def points(path: str) -> np.ndarray:
    """Corners of an SVG path of straight lines: (N, 2), x and y in pixels."""
    return np.array([[float(number) for number in re.split("[, ]", pair)] for pair in re.split("[ML]", path)[1:]])


def falls_as_logged(curve: np.ndarray, stage: str) -> bool:
    """Whether the corners are the logged epochs and values, on linear axes of whatever range."""
    if len(curve) != EPOCHS:
        return False
    logged = np.array([[epoch, loss(stage, epoch)] for epoch in range(EPOCHS)])
    for axis in (0, 1):
        slope, start = np.polyfit(logged[:, axis], curve[:, axis], 1)
        if np.abs(slope * logged[:, axis] + start - curve[:, axis]).max() > 1e-3 * np.ptp(curve[:, axis]):
            return False
    return True
