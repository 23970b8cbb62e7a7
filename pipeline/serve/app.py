"""The addresses of the server: OpenAI's images API, the page, the report, health and metrics.

Every answer is JSON in OpenAI's form, errors too, but for the page, pictures, the report and metrics. Nothing is taken
from another site: a request for pictures must be of type application/json, which a browser does not send across sites
unasked.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
import mimetypes
import time
from contextlib import aclosing
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from export.errors import RecipeError, UserError
from pipeline import machine
from pipeline.bundle.bundle import Bundle
from pipeline.bundle.pipeline_bundle import PipelineBundle
from pipeline.bundle.snapshot import read_verified
from pipeline.generate.conditioning import MOST_GUIDANCE
from pipeline.serve import images_request, metrics
from pipeline.serve.border import Border
from pipeline.serve.images_request import ApiError, Asked
from pipeline.serve.jobs import Drawn, Preview
from pipeline.serve.service import ClientLeftError, Service, Submitted, as_png

PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
REPORT = "report/"
# The page takes nothing from elsewhere. A bundle, and so its report, may be from elsewhere: it runs nothing.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:"
SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
BODY_WITHIN_S = 30.0  # of a request's arrival, or half of the time that it may take
LEFT = 499  # what servers log for a client that left; nobody receives it


def make_app(service: Service, api_key: str | None = None, names: frozenset[str] | None = None) -> FastAPI:
    """The application around a started service. api_key: what /v1 asks for as a bearer token; None: nothing. names:
    that it answers to, see Border; None: to any."""
    app = FastAPI(title=machine.PROGRAM, version=machine.own_version(), docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(UserError, _answer_user_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_bug)
    app.add_middleware(Border, names=names)

    schema = images_request.schema(service.pipeline)
    documented = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @app.post(images_request.PATH, openapi_extra=documented)
    async def generations(request: Request) -> Response:
        """Draw pictures of a prompt."""
        return await _generations(service, api_key, request)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The one model, with what it draws by default."""
        _check_key(request, api_key)
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        _check_key(request, api_key)
        if name != service.pipeline.name:
            raise ApiError(404, f"model {name!r} is not here", code="model_not_found", param="model")
        return _model(service)

    @app.get("/pictures/{name}.png")
    async def picture(name: str) -> Response:
        """A picture that was asked for by url."""
        png = service.store.get(name)
        if png is None:
            raise ApiError(404, "the picture is not here, or not any more; ask for b64_json to keep it")
        return Response(png, media_type="image/png", headers=SAFE)

    @app.get("/report/{name:path}")
    async def report(name: str) -> Response:
        """The bundle's own report on its engine, or on its pipeline."""
        return _report(service.pipeline.bundle, REPORT + (name or "index.html"))

    @app.get("/{component}/report/{name:path}")
    async def report_of_component(component: str, name: str) -> Response:
        """What the report on a pipeline leads to."""
        whole = service.pipeline.bundle
        part = whole.components.get(component) if isinstance(whole, PipelineBundle) else None
        return _report(part, REPORT + (name or "index.html"))

    @app.get("/health")
    async def health() -> Response:
        status = 200 if service.state == "ready" else 503
        return JSONResponse({"status": service.state, "queue": len(service.queue)}, status)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": metrics.MEDIA_TYPE})

    for path, name in PAGE.items():
        app.add_api_route(path, _file_of_page(name), include_in_schema=False)
    return app


def _file_of_page(name: str) -> Any:
    content = resources.files("pipeline.serve").joinpath("page", name).read_bytes()
    kind, headers = mimetypes.guess_type(name)[0], {"Content-Security-Policy": PAGE_POLICY, **SAFE}

    async def file() -> Response:
        return Response(content, media_type=kind, headers=headers)

    return file


def _report(bundle: Bundle | PipelineBundle | None, name: str) -> Response:
    """A file of the bundle's report, as its manifest has it. Raises ApiError for any other."""
    row = None if bundle is None else bundle.manifest["files"].get(name)
    if bundle is None or row is None:
        raise ApiError(404, f"the bundle has no {name}")
    content = io.BytesIO()
    read_verified(bundle.path, name, row, content)
    kind, headers = mimetypes.guess_type(name)[0], {"Content-Security-Policy": REPORT_POLICY, **SAFE}
    return Response(content.getvalue(), media_type=kind, headers=headers)


def _model(service: Service) -> dict[str, Any]:
    """As OpenAI describes a model, and what it draws under `ditc`."""
    pipeline = service.pipeline
    has_report = pipeline.bundle is not None and f"{REPORT}index.html" in pipeline.bundle.manifest["files"]
    facts = {
        "size": f"{pipeline.width}x{pipeline.height}",
        "steps": pipeline.n_steps,
        "guidance": pipeline.guidance_scale,
        "examples": pipeline.examples,
        "most": {
            "n": images_request.MOST_PICTURES,
            "steps": images_request.most_steps(pipeline),
            "prompt": images_request.MOST_CHARACTERS,
            "guidance": MOST_GUIDANCE,
        },
        "report": f"/{REPORT}" if has_report else None,
    }
    row = {"id": pipeline.name, "object": "model", "created": service.created, "owned_by": machine.PROGRAM}
    return {**row, "ditc": facts}


# --- pictures --------------------------------------------------------------------------------------------------------


async def _generations(service: Service, api_key: str | None, request: Request) -> Response:
    arrived = time.monotonic()
    try:
        async with service.counted(arrived) as counting:
            _check_key(request, api_key)
            body = await _body(request, min(BODY_WITHIN_S, service.limits.timeout_s / 2))
            asked = images_request.read(body, service.pipeline)
            submitted = service.submit(asked)
            if not asked.stream:
                return JSONResponse(await _all_pictures(service, asked, submitted, request))
            counting.goes_on = True
    except ClientLeftError:
        return Response(status_code=LEFT)
    return EventStream(service, asked, submitted, arrived)


async def _body(request: Request, within_s: float) -> bytes:
    """The whole body. Raises ApiError for one of another type, too long or too slow, and ClientLeftError for a part of
    one."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind[:80]!r}; send application/json")
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() != "identity":
        raise ApiError(415, f"the content encoding is {coding[:80]!r}; send the JSON as it is")
    body, most = bytearray(), images_request.MOST_BODY_BYTES
    try:
        async with asyncio.timeout(within_s):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise ApiError(413, f"the body has more than {most} bytes; send a shorter prompt")
    except ClientDisconnect:
        raise ClientLeftError from None
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {within_s:g} s; send it at once", code="timeout") from None
    return bytes(body)


async def _left(receive: Receive) -> None:
    """Returns when the client has left, once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def _all_pictures(service: Service, asked: Asked, submitted: Submitted, request: Request) -> dict[str, Any]:
    """OpenAI's answer with all pictures, in the order of their seeds."""
    rows: dict[int, dict[str, Any]] = {}
    async with aclosing(service.events(submitted, _left(request.receive))) as events:
        async for event in events:
            if isinstance(event, Drawn):
                png, seed = await as_png(event.pixels), asked.request.pictures[event.index].seed
                row = {"url": _address(request, service.store.put(png))} if asked.by_url else _in_text(png)
                rows[event.index] = row | {"seed": seed, "warnings": asked.warnings}
    return {"created": int(time.time()), "data": [rows[index] for index in sorted(rows)]}


def _address(request: Request, name: str) -> str:
    return f"{str(request.base_url).rstrip('/')}/pictures/{name}.png"


def _in_text(png: bytes) -> dict[str, Any]:
    return {"b64_json": base64.b64encode(png).decode()}


class EventStream(Response):
    """Previews and pictures as server-sent events, as OpenAI names them; `index` says which picture of the request."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, asked: Asked, submitted: Submitted, arrived: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.service, self.asked, self.submitted, self.arrived = service, asked, submitted, arrived

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def say(kind: str, **fields: object) -> None:
            text = f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with (
                self.service.counted(self.arrived),
                aclosing(self.service.events(self.submitted, _left(receive))) as events,
            ):
                async for event in events:
                    await say(**await self._fields(event))
        except ClientLeftError:
            return
        except ApiError as error:
            await say("error", error=error.fields)
        await send({"type": "http.response.body", "body": b""})

    async def _fields(self, event: Preview | Drawn) -> dict[str, Any]:
        """Of an event, `kind` among them."""
        height, width = event.pixels.shape[:2]
        fields = _in_text(await as_png(event.pixels)) | {
            "created_at": int(time.time()),
            "size": f"{width}x{height}",
            "quality": "auto",
            "background": "opaque",
            "output_format": "png",
            "index": event.index,
            "seed": self.asked.request.pictures[event.index].seed,
            "warnings": self.asked.warnings,
        }
        if isinstance(event, Drawn):
            return {"kind": "image_generation.completed", **fields}
        place = sorted(self.asked.preview_steps).index(event.steps_done)
        steps = {"partial_image_index": place, "steps_done": event.steps_done, "steps": event.n_steps}
        return {"kind": "image_generation.partial_image", **fields, **steps}


# --- refusals --------------------------------------------------------------------------------------------------------


def _check_key(request: Request, api_key: str | None) -> None:
    """Raise ApiError unless the request has the server's key, if that has one."""
    if api_key is None:
        return
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), api_key.encode()):
        raise ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key")


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse({"error": error.fields}, error.status, error.headers)


async def _answer_user_error(request: Request, error: Exception) -> Response:
    """Nonsense is the client's fault; a bundle that changed or a resource that is short is not."""
    status, kind = (400, "invalid_request_error") if isinstance(error, RecipeError) else (500, "server_error")
    return await _answer_error(request, ApiError(status, " ".join(str(error).split()), kind=kind))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; GET /openapi.json says what there is"
    return JSONResponse({"error": ApiError(error.status_code, message).fields}, error.status_code, error.headers)


async def _answer_bug(request: Request, error: Exception) -> Response:
    message = f"internal error, {type(error).__name__}; the server's log has more"
    return await _answer_error(request, ApiError(500, message, kind="server_error"))
