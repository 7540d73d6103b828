"""The page and an HTTP API with the same answers, in one process: streamlit run serve.py

    curl -F pictures=@cat.jpg -F pictures=@dog.png 'http://localhost:8501/api/classify?overlays=true'

The OpenAPI description is at /api/openapi.json. Uploads stay in memory.
"""

import base64
from collections.abc import AsyncGenerator
from functools import cache, partial
from threading import Lock
from typing import Any

import anyio
import streamlit as st
import torch
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from engine import BadEngine, load_for_page
from gallery import MAX_PICTURES, MAX_TOTAL_MEGABYTES, OVERLAY_SIDE
from gradcam import explain, overlay_png
from images import BadImage, open_picture
from model import CLASSES, NOT_SURE, BadCheckpoint, Classifier
from sessions import MAX_BODY, RETRY_AFTER, UploadLimitMiddleware, core_semaphore, pictures_at_once

MAX_WAITING = 16  # requests beyond those that are being answered; further ones get status 429
TOO_MANY_REQUESTS = "Too many requests are waiting. Try again in a few seconds."
MAX_OVERLAYS = 10  # in one response; all are in memory at once, each up to 2.6 MB as base64
LOAD_LOCK = Lock()
BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def base_path() -> str:
    """The setting `server.baseUrlPath` as the beginning of a path: /memes, or empty."""
    return f"/{st.get_option('server.baseUrlPath').strip('/')}".rstrip("/")


def load_classifier() -> Classifier:
    """Load the checkpoint once, even if the first requests are concurrent."""
    with LOAD_LOCK:
        return _load_classifier()


@cache
def _load_classifier() -> Classifier:
    torch.set_num_threads(1)  # concurrent requests already keep the cores busy
    return load_for_page()


@cache
def worker_threads() -> anyio.CapacityLimiter:
    """One worker thread for each picture that may be open."""
    return anyio.CapacityLimiter(pictures_at_once())


@cache
def request_slots() -> anyio.CapacityLimiter:
    """One slot for each request that is being answered or waits."""
    return anyio.CapacityLimiter(pictures_at_once() + MAX_WAITING)


async def read_uploads(request: Request) -> list[tuple[str, bytes]]:
    """Read the name and the content of each picture in the body of a request.

    Raises:
        HTTPException: 413, 415 or 422 with a sentence for the client.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "Send the pictures as multipart/form-data, in fields named pictures.")

    async def limited_stream() -> AsyncGenerator[bytes, None]:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_BODY:
                raise HTTPException(413, f"The limit for one request is {MAX_TOTAL_MEGABYTES} MB.")
            yield chunk

    try:
        parser = MultiPartParser(request.headers, limited_stream(), max_files=MAX_PICTURES, max_fields=MAX_PICTURES)
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:  # the last two for a missing or invalid boundary
        raise HTTPException(422, f"The body cannot be read: {error}") from error
    uploads = [part for part in form.getlist("pictures") if isinstance(part, UploadFile)]
    if not uploads:
        raise HTTPException(422, "There is no file in a field named pictures.")
    # A declared charset can produce lone surrogates, which UTF-8 cannot encode.
    names = [(upload.filename or "").encode(errors="replace").decode() for upload in uploads]
    return [(name, await upload.read()) for name, upload in zip(names, uploads, strict=True)]


def classify_picture(name: str, data: bytes, *, with_overlay: bool) -> dict[str, Any]:
    """Classify one picture for the response. The sides of an overlay are at most `OVERLAY_SIDE` pixels long."""
    classifier = load_classifier()
    with core_semaphore():
        try:
            picture = open_picture(data)
        except BadImage as error:
            return {"name": name, "error": str(error)}
        (explanation,) = explain(classifier, [picture])
        prediction = explanation.prediction
        row: dict[str, Any] = {
            "name": name,
            "label": prediction.label,
            "meme_probability": round(prediction.meme_probability, 4),
            "verdict": prediction.verdict,
            "warning": picture.info["warning"] or None,
        }
        if with_overlay:
            picture.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
            row["overlay_png"] = base64.b64encode(overlay_png(classifier, picture, explanation)).decode()
    return row


async def classify_pictures(uploads: list[tuple[str, bytes]], *, with_overlays: bool) -> list[dict[str, Any]]:
    """Classify the pictures of one request one after the other."""
    try:  # a burst of requests passes the check in `classify` before any of them has taken a slot
        request_slots().acquire_nowait()
    except anyio.WouldBlock as error:
        raise HTTPException(429, TOO_MANY_REQUESTS) from error
    try:
        work = [partial(classify_picture, *upload, with_overlay=with_overlays) for upload in uploads]
        return [await anyio.to_thread.run_sync(one, limiter=worker_threads()) for one in work]
    finally:
        request_slots().release()


async def classify(request: Request) -> Response:
    """POST /api/classify."""
    try:
        with_overlays = BOOLEANS.get(request.query_params.get("overlays", "false").lower())
        if with_overlays is None:
            raise HTTPException(422, "overlays must be true or false.")
        if request_slots().available_tokens < 1:
            raise HTTPException(429, TOO_MANY_REQUESTS)
        uploads = await read_uploads(request)
        if with_overlays and len(uploads) > MAX_OVERLAYS:
            raise HTTPException(422, f"The limit for one request with overlays is {MAX_OVERLAYS} pictures.")
        rows = await classify_pictures(uploads, with_overlays=with_overlays)
        if len(rows) == 1 and "error" in rows[0]:
            raise HTTPException(422, rows[0]["error"])
        return JSONResponse({"checkpoint": load_classifier().sha256, "pictures": rows})
    except HTTPException as error:
        headers = {"Retry-After": RETRY_AFTER} if error.status_code == 429 else None
        return JSONResponse({"error": error.detail}, error.status_code, headers)
    except (BadCheckpoint, BadEngine) as error:
        return JSONResponse({"error": str(error)}, 503)
    except ClientDisconnect:
        return Response(status_code=499)


def openapi(_request: Request) -> Response:
    """GET /api/openapi.json."""
    about_overlays = (
        f"Whether to return the heatmap overlay of each picture; at most {MAX_OVERLAYS} pictures per request"
    )
    error = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    error_content = {"application/json": {"schema": error}}
    prediction = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "label": {"enum": list(CLASSES)},
            "meme_probability": {"type": "number", "minimum": 0, "maximum": 1},
            "verdict": {"enum": [*CLASSES, NOT_SURE]},
            "warning": {"type": ["string", "null"]},
            "overlay_png": {"type": "string", "contentEncoding": "base64"},
            "error": {"type": "string"},
        },
        "required": ["name"],
    }
    response = {
        "type": "object",
        "properties": {"checkpoint": {"type": "string"}, "pictures": {"type": "array", "items": prediction}},
        "required": ["checkpoint", "pictures"],
    }
    body = {
        "type": "object",
        "properties": {
            "pictures": {
                "type": "array",
                "items": {"type": "string", "format": "binary"},
                "minItems": 1,
                "maxItems": MAX_PICTURES,
            }
        },
        "required": ["pictures"],
    }
    responses = {
        "200": {"description": "The prediction for each picture", "content": {"application/json": {"schema": response}}}
    }
    responses |= {
        status: {"description": reason, "content": error_content}
        for status, reason in (
            ("413", "The body is too large"),
            ("415", "The body is not multipart/form-data"),
            ("422", "No picture, an invalid parameter, or a single picture that cannot be read"),
            ("429", "Too many requests are waiting"),
            ("503", "The checkpoint cannot be read, or the server holds too many uploads"),
        )
    }
    return JSONResponse(
        {
            "openapi": "3.1.0",
            "info": {"title": "Meme Classifier", "version": "1"},
            "servers": [{"url": base_path() or "/"}],
            "paths": {
                "/api/classify": {
                    "post": {
                        "operationId": "classify",
                        "summary": "Classify pictures as memes or not",
                        "parameters": [
                            {
                                "name": "overlays",
                                "in": "query",
                                "description": about_overlays,
                                "schema": {"anyOf": [{"type": "boolean"}, {"enum": list(BOOLEANS)}], "default": False},
                            }
                        ],
                        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": body}}},
                        "responses": responses,
                    }
                }
            },
        }
    )


def refuse(request: Request) -> Response:
    """Answer every other request below /api, which would otherwise get the page."""
    if endpoint := ENDPOINTS.get(request.path_params["rest"]):
        _, allowed = endpoint
        return JSONResponse({"error": f"This address accepts {allowed} only."}, 405, {"Allow": allowed})
    sentence = f"There is no such address; {base_path()}/api/openapi.json lists those that exist."
    return JSONResponse({"error": sentence}, 404)


ENDPOINTS = {"classify": (classify, "POST"), "openapi.json": (openapi, "GET")}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
# Scripts on pages of other origins can read the answers only if this setting names their origin.
origins = st.get_option("server.corsAllowedOrigins")
cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], expose_headers=["Retry-After"])
api = [Route(f"/{path}", endpoint, methods=[method]) for path, (endpoint, method) in ENDPOINTS.items()]
api.append(Route("/{rest:path}", refuse, methods=METHODS))
routes = [Mount(f"{base_path()}/api", routes=api, middleware=[cors] if origins else [])]
app = st.App("app.py", routes=routes, middleware=[Middleware(UploadLimitMiddleware, origins=origins)])
