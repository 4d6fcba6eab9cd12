"""`/status` of the dashboard: how far each run is, in words and with its `progress.png`, for a phone."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

from werkzeug.wrappers import Request, Response

from app.errors import MachineError
from app.ops.status import read_status, status_text
from app.workspace import RunDir, Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

REFRESH_S = 15
PICTURE = re.compile(r"/status/(?:(?P<run>[A-Za-z0-9_-]{1,64})/)?progress\.png")
UNNAMED = "run without a name"
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:1rem auto;max-width:75rem;padding:0 .75rem;"
    "background:#fff;color:#222}"
    "pre{font:13px/1.5 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;background:#f4f4f4;"
    "padding:.6rem;border-radius:.3rem}"
    "img{width:100%;height:auto}h2{font-size:1.1rem;margin:1.2rem 0 .4rem}"
    "@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}pre{background:#242424}a{color:#8ab4f8}}"
)
POLICY = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


class StatusPages:
    """Answers `/status` and the pictures below it."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def answer(self, request: Request) -> Response | None:
        """The page or picture at this path; None where the path is not one of ours."""
        if request.path in ("/status", "/status/"):
            return Response(self._page(), headers=POLICY, content_type="text/html; charset=utf-8")
        match = PICTURE.fullmatch(request.path)
        return None if match is None else self._picture(self._workspace.run_dir(match["run"]), request)

    def _page(self) -> str:
        runs = sorted(self._runs(), key=_last_change, reverse=True)
        sections = [_section(name, run_dir) for name, run_dir in runs]
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>status</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="refresh" content="{REFRESH_S}"><style>{STYLE}</style></head><body>'
            f'<p><a href="/">TensorBoard</a></p>{"".join(sections) or "<p>No run has started yet.</p>"}</body></html>'
        )

    def _runs(self) -> Iterator[tuple[str | None, RunDir]]:
        """Every run that has something to tell, the one without a name as None."""
        folder = self._workspace.checkpoints
        names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        for name in (None, *names):
            run_dir = self._workspace.run_dir(name)
            if run_dir.status.exists() or run_dir.reason.exists():
                yield name, run_dir

    def _picture(self, run_dir: RunDir, request: Request) -> Response:
        try:
            with run_dir.progress_png.open("rb") as file:
                picture = file.read()
        except OSError:
            return Response("There is no picture of this run yet.\n", 404, POLICY, content_type="text/plain")
        answer = Response(picture, headers={**POLICY, "Cache-Control": "private, no-cache"}, content_type="image/png")
        answer.add_etag()
        return answer.make_conditional(request)


def _section(name: str | None, run_dir: RunDir) -> str:
    title = escape(name or UNNAMED)
    source = "/status/progress.png" if name is None else f"/status/{name}/progress.png"
    shown = run_dir.progress_png.exists() and PICTURE.fullmatch(source)
    picture = (
        f'<a href="{source}"><img src="{source}" alt="curves of {title}"></a>' if shown else "<p>No picture yet.</p>"
    )
    return f"<h2>{title}</h2><pre>{escape(_words(run_dir))}</pre>{picture}"


def _words(run_dir: RunDir) -> str:
    if not run_dir.status.exists():
        return f"REASON  {run_dir.reason.read_text(errors='replace').strip()}"
    try:
        return status_text(run_dir, read_status(run_dir))
    except (MachineError, OSError) as error:
        return str(error)
    except (KeyError, TypeError, ValueError) as error:
        return f"{run_dir.status}: cannot be understood ({type(error).__name__}: {error})"


def _last_change(run: tuple[str | None, RunDir]) -> float:
    times = [path.stat().st_mtime for path in (run[1].status, run[1].reason) if path.exists()]
    return max(times, default=0.0)
