"""The app of the status page: the page, its pictures, the reports of the runs, and the same figures as JSON.

/                                 the page
/runs, /runs/NAME                 the figures of all runs, or of one, as JSON
/runs/NAME/report                 the run's report as of now
/runs/NAME/samples.webp           the newest samples, scaled down; /runs/NAME/samples/UPDATE.png at full size
/runs/NAME/curves/NUMBER.svg      a curve
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from PIL import Image
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from npedit import __version__
from npedit.data._photos import BadImage, read_photo
from npedit.errors import UserError
from npedit.serve.access import Password
from npedit.serve.curve_svg import PANELS
from npedit.serve.page_headers import PageHeaders
from npedit.serve.watch import RunStatus, Watch, sample_pictures
from npedit.serve.watch_page import render_page

log = logging.getLogger(__name__)

MOST_SIDE = 1400  # of the samples on the page, in pixels
KEPT = {"Cache-Control": "private, max-age=86400"}  # for pictures whose address changes with their content
NOT_KEPT = {"Cache-Control": "no-store"}


def make_watch_app(folder: Path, token: str, hosts: Sequence[str]) -> FastAPI:
    """The app. With a `token` the browser asks for it as a password. Only requests to `hosts` are answered; empty
    allows all."""
    app = FastAPI(title="npedit", version=__version__, docs_url=None, redoc_url=None)
    watch = Watch(folder)
    _add_page(app, watch)
    _add_pictures(app, watch)
    _add_report(app, watch)
    app.exception_handler(UserError)(_not_found)
    app.add_middleware(GZipMiddleware, minimum_size=2000)
    app.add_middleware(PageHeaders)
    if token:
        app.add_middleware(Password, token=token)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return app


async def _not_found(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": {"message": str(error)}}, 404)


def _add_page(app: FastAPI, watch: Watch) -> None:
    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return HTMLResponse(render_page(str(watch.folder), watch.look()), headers=NOT_KEPT)

    @app.get("/favicon.ico", include_in_schema=False)
    def icon() -> Response:
        """No icon, which every browser asks for."""
        return Response(status_code=204)

    @app.get("/runs")
    def runs() -> dict[str, Any]:
        """All runs as they are now."""
        return {"runs": [status.as_dict() for status in watch.look()]}

    @app.get("/runs/{name}")
    def run(name: str) -> dict[str, Any]:
        """One run as it is now."""
        return watch.find(name).as_dict()


def _add_pictures(app: FastAPI, watch: Watch) -> None:
    @app.get("/runs/{name}/samples.webp", response_class=Response)
    def samples(name: str, v: str = "") -> Response:
        """The newest samples that can be read, scaled down."""
        status = watch.find(name)
        picture = _newest_picture(status)
        if picture is None:
            return Response(status_code=404)
        update, data = picture
        is_wanted = status.samples_version == v and update == status.samples
        return Response(data, media_type="image/webp", headers=KEPT if is_wanted else NOT_KEPT)

    @app.get("/runs/{name}/samples/{update}.png", response_class=Response)
    def full_samples(name: str, update: int) -> Response:
        """The samples after an update, at full size."""
        found = dict(sample_pictures(watch.find(name).folder))
        if update not in found or not found[update].is_file():
            return Response(status_code=404)
        return FileResponse(found[update], media_type="image/png", headers=NOT_KEPT)

    @app.get("/runs/{name}/curves/{number}.svg", response_class=Response)
    def curves(name: str, number: int) -> Response:
        """A curve of the run."""
        if not 0 <= number < len(PANELS):
            return Response(status_code=404)
        return Response(watch.draw_panel(name, PANELS[number]), media_type="image/svg+xml", headers=KEPT)


def _newest_picture(status: RunStatus) -> tuple[int, bytes] | None:
    """The update and the picture of the newest samples. A picture that is still being written cannot be read, and the
    one before it is taken."""
    for update, path in sample_pictures(status.folder)[:2]:
        try:
            return update, _scale_down(path, path.stat().st_mtime_ns)
        except (OSError, BadImage):
            continue
    return None


@lru_cache(maxsize=64)
def _scale_down(path: Path, changed_at: int) -> bytes:
    """A picture as a WebP file of at most `MOST_SIDE` pixels a side. `changed_at` is a part of the cache's key."""
    picture = read_photo(path)
    picture.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=90)
    return out.getvalue()


def _add_report(app: FastAPI, watch: Watch) -> None:
    drawing = threading.Lock()  # a report of a long run needs much memory for a moment

    @app.get("/runs/{name}/report", response_class=HTMLResponse)
    def report(name: str) -> str:
        """The run's report as of now. Nothing is written into the run."""
        folder = watch.find(name).folder
        with drawing:
            return _make_report(folder)


def _make_report(run: Path) -> str:
    from npedit.report.report import make_report  # it needs much memory, and is not used at each visit

    try:
        return make_report(run)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OSError) as error:
        log.exception("the report of %s could not be made", run)
        raise UserError(f"expected files of a run; got damaged ones ({type(error).__name__}: {error})") from None
