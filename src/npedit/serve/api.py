"""The HTTP interface: `/v1/edits` (a picture comes back), `/v1/images/edits` (the form of OpenAI's interface, for
existing clients), `/v1/models`, `/health`, `/metrics`, and `/openapi.json`."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from npedit import __version__
from npedit.errors import UserError
from npedit.serve.access import LOCAL_HOSTS, has_bearer_token
from npedit.serve.body_limit import BodyLimit
from npedit.serve.editor_choice import EditorChoice
from npedit.serve.limits import BadRequest, Limits, read_bool, read_instruction, read_int, read_picture
from npedit.serve.metrics import Metrics
from npedit.serve.pictures import MEDIA_TYPES, encode_picture
from npedit.serve.queue import REFUSALS, Draining, EditQueue, EditRequest, QueueFull, TooLate
from npedit.serve.runs import Runs

TOKEN_PATHS = ("/v1/", "/metrics")  # not /health, which a load balancer asks; the page has a login of its own
MOST_SEED = 2**63 - 1
SECONDS_BETWEEN_LOOKS = 0.25  # at whether the client is still there


@dataclass
class ServerSettings:
    """How a server is reached. `name` is its model's name, and `editor` the name in the metadata of the results.
    `token` "" asks for none. `hosts` are the names that requests may address, so that a page of another site cannot
    reach a server on this machine through a name of its own; empty allows all."""

    name: str = "embedded"
    token: str = ""
    hosts: Sequence[str] = LOCAL_HOSTS
    limits: Limits = field(default_factory=Limits)
    editor: str = "npedit"


class ClientGone(Exception):
    """The client closed the connection before its edit was ready."""


def make_app(queue: EditQueue, settings: ServerSettings, runs: Runs | None = None) -> FastAPI:
    """The app of one editor, or of the editors of `runs`; `queue` is closed when the app ends. It has no pages /docs
    and /redoc, because those of FastAPI load their scripts from elsewhere."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        yield
        await asyncio.to_thread(queue.close)

    app = FastAPI(title="npedit", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    metrics = Metrics(lambda: len(queue))
    queue.on_batch = metrics.note_batch
    app.state.queue, app.state.settings, app.state.metrics = queue, settings, metrics
    app.state.choice = EditorChoice(settings.name, settings.editor, runs)
    _add_errors(app)
    _add_state(app)
    _add_edits(app)
    _add_openai(app)
    _add_rest(app)
    app.middleware("http")(_guard(settings, metrics))
    app.add_middleware(BodyLimit, most=settings.limits.bytes)
    if settings.hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts), www_redirect=False)
    return app


# --------------------------------------------------------------------------------------------------- guard and errors


def _guard(settings: ServerSettings, metrics: Metrics) -> Any:
    """Ask for the token, and count the request."""

    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        begun, status = time.monotonic(), 500
        metrics.in_progress.inc()
        try:
            response = _refusal(request, settings) or await call_next(request)
            status = response.status_code
            return response
        finally:
            route = getattr(request.scope.get("route"), "path", "other")
            metrics.in_progress.dec()
            metrics.requests.labels(route, status).inc()
            metrics.seconds.labels(route).observe(time.monotonic() - begun)

    return guard


def _refusal(request: Request, settings: ServerSettings) -> Response | None:
    """The answer to a request that may not be made, before its body is read; None if it may."""
    if not _is_allowed(request, settings.token):
        return _error("expected the server's token as 'Authorization: Bearer TOKEN'", 401)
    if settings.hosts and _is_from_another_site(request):
        return _error("expected a request of this server's own page or of a program; got one of another site", 403)
    return None


def _is_from_another_site(request: Request) -> bool:
    """Whether a page of another site makes the browser change something here. Only browsers send `Origin`."""
    origin = request.headers.get("origin")
    if origin is None or request.method in ("GET", "HEAD"):
        return False
    return origin.partition("://")[2] != request.headers.get("host", "")


def _is_allowed(request: Request, token: str) -> bool:
    """Whether no token is needed, or the request has it."""
    path = request.scope["path"]  # not that of `request.url`, in which the client's header Host has a part
    if not token or not path.startswith(TOKEN_PATHS):
        return True
    return has_bearer_token(request.headers.get("authorization", ""), token)


def _error(message: str, status: int, param: str = "") -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": param or None, "code": None}}
    headers = {"Retry-After": "5"} if status in (429, 503) else {}
    return JSONResponse(body, status, headers)


def _add_errors(app: FastAPI) -> None:
    """What each error becomes."""
    answers: dict[type[Exception], tuple[int, str]] = {
        QueueFull: (429, REFUSALS[QueueFull]),
        TooLate: (503, REFUSALS[TooLate]),
        Draining: (503, REFUSALS[Draining]),
        ClientGone: (499, "the client closed the connection"),
    }
    for kind, (status, words) in answers.items():
        app.exception_handler(kind)(_answer(words, status))

    @app.exception_handler(BadRequest)
    async def bad(_: Request, error: BadRequest) -> Response:
        return _error(str(error), error.status, error.param)

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> Response:
        return _error(str(error), 400)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field_name = str(first["loc"][-1])
        return _error(f"expected a right value in {field_name!r}; got: {first['msg']}", 400, field_name)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        return _error(str(error.detail), error.status_code)

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        return _error(f"the editor failed: {type(error).__name__}", 500)


def _answer(words: str, status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(_: Request, error: Exception) -> Response:
        return _error(words, status)

    return answer


# -------------------------------------------------------------------------------------------------------------- state


def _add_state(app: FastAPI) -> None:
    queue, choice, metrics = app.state.queue, app.state.choice, app.state.metrics

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 once the editor is open; 503 before, and while the server stops."""
        is_open = queue.editor.done() and not queue.editor.exception()
        state = "stopping" if queue.is_draining else "ok" if is_open else "starting"
        return JSONResponse({"status": state, "waiting": len(queue)}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names of the editors, as OpenAI's clients ask for them."""
        return await asyncio.to_thread(choice.describe)


# -------------------------------------------------------------------------------------------------------------- edits


async def _edited(request: Request, queue: EditQueue, wanted: Sequence[EditRequest]) -> list[Image.Image]:
    """The pictures, in order. If the client goes away, those not begun are not edited."""
    results: list[Future[Image.Image]] = []
    futures: list[asyncio.Future[Image.Image]] = []
    try:
        for one in wanted:
            results.append(queue.submit(one))
        futures = [asyncio.wrap_future(one) for one in results]
        while pending := [f for f in futures if not f.done()]:
            await asyncio.wait(pending, timeout=SECONDS_BETWEEN_LOOKS)
            if await request.is_disconnected():
                raise ClientGone
        return [f.result() for f in futures]
    finally:
        for result in results:
            result.cancel()
        await asyncio.gather(*futures, return_exceptions=True)


def _add_edits(app: FastAPI) -> None:
    queue, choice = app.state.queue, app.state.choice
    limits = app.state.settings.limits

    @app.post("/v1/edits", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    async def edit(
        request: Request,
        image: Annotated[UploadFile, File(description="The photo.")],
        instruction: Annotated[str, Form(description="What to change.")],
        reference: Annotated[
            list[UploadFile] | None, File(description="Further pictures that the editor sees.")
        ] = None,
        seed: Annotated[str, Form(description="A whole number; the same seed gives the same picture.")] = "0",
        steps: Annotated[str, Form(description="Sampling steps; empty: as in training.")] = "",
        output_format: Annotated[str, Form(description="png, jpeg or webp.")] = "png",
        keep_resolution: Annotated[
            str, Form(description="true: what the edit left unchanged is the photo's own at full size.")
        ] = "false",
        run: Annotated[str, Form(description="One of /v1/models; empty: the editor of the server's start.")] = "",
    ) -> Response:
        """Edit one picture; the answer is the edited picture's file."""
        media = _media_type(output_format)
        chosen, editor = await asyncio.to_thread(choice.find, run, "run")
        further = await _references(reference or [], limits, queue, chosen)
        wanted = EditRequest(
            await _picture(image, limits, "image"),
            read_instruction(instruction, limits, "instruction"),
            read_int(seed, "seed", 0, 0, MOST_SEED) or 0,
            read_int(steps, "steps", None, 1, limits.steps),
            further,
            read_bool(keep_resolution, "keep_resolution"),
            chosen,
        )
        (picture,) = await _edited(request, queue, [wanted])
        data = await asyncio.to_thread(encode_picture, picture, output_format, editor)
        return Response(data, media_type=media, headers={"X-Seed": str(wanted.seed)})


def _media_type(output_format: str) -> str:
    if output_format not in MEDIA_TYPES:
        raise BadRequest(
            f"expected {', '.join(MEDIA_TYPES)} in 'output_format'; got {output_format[:40]!r}", "output_format"
        )
    return MEDIA_TYPES[output_format]


async def _picture(upload: UploadFile, limits: Limits, param: str, results: int = 1) -> Image.Image:
    return await asyncio.to_thread(read_picture, await upload.read(), limits, param, results)


async def _references(
    uploads: Sequence[UploadFile], limits: Limits, queue: EditQueue, run: str
) -> tuple[Image.Image, ...]:
    """The further pictures. A chosen run's editor may not be open yet; it refuses itself what it does not take."""
    if not uploads:
        return ()
    most = limits.references if run else min(limits.references, queue.most_references)
    if len(uploads) > most:
        raise BadRequest(f"expected at most {most} further pictures; got {len(uploads)}", "reference")
    return tuple([await _picture(upload, limits, "reference") for upload in uploads])


def _add_rest(app: FastAPI) -> None:
    """An answer in JSON for what `/v1/` does not have; other paths are the page's."""

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    async def rest(request: Request, rest: str) -> Response:
        return _error("expected a path and a method of /openapi.json; there is none of this name", 404)


# ------------------------------------------------------------------------------------------------------- OpenAI's form


def _add_openai(app: FastAPI) -> None:
    queue, choice = app.state.queue, app.state.choice
    limits = app.state.settings.limits

    @app.post("/v1/images/edits")
    async def openai_edit(
        request: Request,
        prompt: Annotated[str, Form(description="What to change.")],
        image: Annotated[list[UploadFile] | None, File(description="The photo, then further pictures.")] = None,
        images: Annotated[list[UploadFile] | None, File(alias="image[]", description="The same, as a list.")] = None,
        mask: Annotated[UploadFile | None, File(description="Not supported.")] = None,
        n: Annotated[str, Form(description="How many results, each with a seed of its own.")] = "1",
        seed: Annotated[str, Form(description="The first result's seed; not in OpenAI's interface.")] = "0",
        size: Annotated[str, Form(description="Only 'auto': a result has its photo's size.")] = "auto",
        response_format: Annotated[str, Form(description="Only 'b64_json'.")] = "b64_json",
        output_format: Annotated[str, Form(description="png, jpeg or webp.")] = "png",
        model: Annotated[str, Form(description="One of /v1/models, if there are several; else it has no effect.")] = "",
    ) -> dict[str, Any]:
        """Edit a picture, in the form of OpenAI's `images.edit`. Fields that are not named here have no effect."""
        _refuse_unsupported(mask, size, response_format)
        _media_type(output_format)
        uploads = [*(image or []), *(images or [])]
        if not uploads:
            raise BadRequest("expected a picture in 'image'; got none", "image")
        count = read_int(n, "n", 1, 1, limits.results) or 1
        photo = await _picture(uploads[0], limits, "image", count)
        run, editor = await asyncio.to_thread(choice.find, model if choice.runs else "", "model")
        further = await _references(uploads[1:], limits, queue, run)
        text = read_instruction(prompt, limits, "prompt")
        first = read_int(seed, "seed", 0, 0, MOST_SEED - count) or 0
        wanted = [EditRequest(photo, text, first + i, None, further, run=run) for i in range(count)]
        pictures = await _edited(request, queue, wanted)
        files = [await asyncio.to_thread(encode_picture, p, output_format, editor) for p in pictures]
        data = [{"b64_json": base64.b64encode(file).decode()} for file in files]
        return {"created": int(time.time()), "output_format": output_format, "data": data}


def _refuse_unsupported(mask: UploadFile | None, size: str, response_format: str) -> None:
    """What OpenAI's interface has and this server has not is refused, and not passed over."""
    if mask is not None:
        raise BadRequest("expected no 'mask': the editor finds the place from the instruction", "mask")
    if size not in ("", "auto"):
        raise BadRequest("expected size 'auto': a result has its photo's size", "size")
    if response_format != "b64_json":
        raise BadRequest("expected response_format 'b64_json': the server keeps no files to link to", "response_format")
