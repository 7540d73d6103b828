"""The page, and the same answers over HTTP, from one process: streamlit run serve.py

    curl -F pictures=@cat.jpg -F pictures=@dog.png 'http://localhost:8501/api/classify?overlays=true'

Described for machines at /api/openapi.json. Uploads stay in memory.
"""

import base64
import os
from collections.abc import AsyncGenerator
from functools import cache, partial
from threading import Lock
from typing import Any

import anyio
import streamlit as st
import torch
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gallery import MAX_PICTURES, MAX_TOTAL_MEGABYTES, OVERLAY_SIDE
from gradcam import answer_png, explain
from images import BadImage, open_picture
from model import CLASSES, NOT_SURE, BadCheckpoint, Classifier
from sessions import MAX_BODY, RETRY_AFTER, UploadLimits, core_semaphore

MAX_WAITING = 16  # requests; more are told to come back later
TOO_MANY = "Too many requests are waiting. Try again in a few seconds."
LOADING = Lock()
MAX_OVERLAYS = 10  # of one request; all are held in memory, at up to 2.6 MB of text each


class Refusal(Exception):
    """A request that gets no answer but a status code and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def load_classifier() -> Classifier:
    """The checkpoint, read once, however many requests come first."""
    with LOADING:
        return _load_classifier()


@cache
def _load_classifier() -> Classifier:
    torch.set_num_threads(1)  # requests at once keep the cores busy
    return Classifier.load()


@cache
def cores() -> anyio.CapacityLimiter:
    """One thread per core."""
    return anyio.CapacityLimiter(os.cpu_count() or 1)


@cache
def places() -> anyio.CapacityLimiter:
    """One for each request that is being answered or waits."""
    return anyio.CapacityLimiter((os.cpu_count() or 1) + MAX_WAITING)


async def read_uploads(request: Request) -> list[tuple[str, bytes]]:
    """The names and contents of the pictures in a request's body."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refusal(415, "Send the pictures as multipart/form-data, in fields named pictures.")

    async def bounded() -> AsyncGenerator[bytes, None]:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_BODY:
                raise Refusal(413, f"The limit for one request is {MAX_TOTAL_MEGABYTES} MB.")
            yield chunk

    try:
        parser = MultiPartParser(request.headers, bounded(), max_files=MAX_PICTURES, max_fields=MAX_PICTURES)
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:  # the last two: of a missing or broken boundary
        raise Refusal(422, f"The body cannot be read: {error}") from error
    uploads = [part for part in form.getlist("pictures") if isinstance(part, UploadFile)]
    if not uploads:
        raise Refusal(422, "There is no file in a field named pictures.")
    # Some encodings can smuggle in what no UTF-8 can say.
    names = [(upload.filename or "").encode(errors="replace").decode() for upload in uploads]
    return [(name, await upload.read()) for name, upload in zip(names, uploads, strict=True)]


def answer(name: str, data: bytes, *, with_overlay: bool) -> dict[str, Any]:
    """One picture's part of the response; an overlay is at most `OVERLAY_SIDE` pixels long."""
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
        }
        if with_overlay:
            picture.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
            row["overlay_png"] = base64.b64encode(answer_png(classifier, picture, explanation)).decode()
    return row


async def classify_batches(uploads: list[tuple[str, bytes]], *, with_overlays: bool) -> list[dict[str, Any]]:
    """Every picture's part of the response, one after the other."""
    try:  # a burst of requests has looked for a place before any of them has taken one
        places().acquire_nowait()
    except anyio.WouldBlock as error:
        raise Refusal(429, TOO_MANY) from error
    try:
        work = [partial(answer, *upload, with_overlay=with_overlays) for upload in uploads]
        return [await anyio.to_thread.run_sync(one, limiter=cores()) for one in work]
    finally:
        places().release()


async def classify(request: Request) -> Response:
    """POST /api/classify."""
    try:
        wanted = request.query_params.get("overlays", "false")
        if wanted not in ("true", "false"):
            raise Refusal(422, "overlays is true or false.")
        if places().available_tokens < 1:
            raise Refusal(429, TOO_MANY)
        uploads = await read_uploads(request)
        if wanted == "true" and len(uploads) > MAX_OVERLAYS:
            raise Refusal(422, f"The limit for one request with overlays is {MAX_OVERLAYS} pictures.")
        rows = await classify_batches(uploads, with_overlays=wanted == "true")
        if len(rows) == 1 and "error" in rows[0]:
            raise Refusal(422, rows[0]["error"])
        return JSONResponse({"checkpoint": load_classifier().sha256, "pictures": rows})
    except Refusal as refusal:
        headers = {"Retry-After": RETRY_AFTER} if refusal.status == 429 else None
        return JSONResponse({"error": str(refusal)}, refusal.status, headers)
    except BadCheckpoint as error:
        return JSONResponse({"error": str(error)}, 503)
    except ClientDisconnect:
        return Response(status_code=499)


def describe(_request: Request) -> Response:
    """GET /api/openapi.json."""
    about_overlays = f"Whether to send each of at most {MAX_OVERLAYS} pictures under its heatmap, too"
    sentence = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    refused = {"application/json": {"schema": sentence}}
    prediction = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "label": {"enum": list(CLASSES)},
            "meme_probability": {"type": "number", "minimum": 0, "maximum": 1},
            "verdict": {"enum": [*CLASSES, NOT_SURE]},
            "overlay_png": {"type": "string", "contentEncoding": "base64"},
            "error": {"type": "string"},
        },
        "required": ["name"],
    }
    answers = {
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
        "200": {"description": "An answer for each picture", "content": {"application/json": {"schema": answers}}}
    }
    responses |= {
        status: {"description": why, "content": refused}
        for status, why in (
            ("413", "The body is too large"),
            ("415", "The body is not multipart/form-data"),
            ("422", "No picture, a parameter that is not understood, or a single picture that cannot be read"),
            ("429", "Too many requests are waiting"),
            ("503", "The checkpoint cannot be read, or more would arrive at once than there is room for"),
        )
    }
    return JSONResponse(
        {
            "openapi": "3.1.0",
            "info": {"title": "Meme Classifier", "version": "1"},
            "paths": {
                "/api/classify": {
                    "post": {
                        "operationId": "classify",
                        "summary": "Say of pictures whether they are memes",
                        "parameters": [
                            {
                                "name": "overlays",
                                "in": "query",
                                "description": about_overlays,
                                "schema": {"type": "boolean", "default": False},
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
    """Whatever else is asked below /api, which else the page would answer."""
    if answered := ANSWERED.get(f"/api/{request.path_params['rest']}"):
        _, allowed = answered
        return JSONResponse({"error": f"Only {allowed} is answered here."}, 405, {"Allow": allowed})
    return JSONResponse({"error": "There is nothing here; /api/openapi.json says what there is."}, 404)


ANSWERED = {"/api/classify": (classify, "POST"), "/api/openapi.json": (describe, "GET")}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
routes = [Route(path, answered, methods=[method]) for path, (answered, method) in ANSWERED.items()]
routes.append(Route("/api/{rest:path}", refuse, methods=METHODS))
app = st.App("app.py", routes=routes, middleware=[Middleware(UploadLimits)])
