"""The page, and the same answers over HTTP, from one process: streamlit run serve.py

    curl -F pictures=@cat.jpg -F pictures=@dog.png 'http://localhost:8501/api/classify?overlays=true'

Described for machines at /api/openapi.json. Uploads stay in memory.
"""

import base64
import os
from collections.abc import AsyncGenerator
from functools import cache, partial
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

from gallery import MAX_PICTURES, MAX_TOTAL_MEGABYTES
from gradcam import answer_png, explain
from images import BadImage, open_picture
from model import CLASSES, NOT_SURE, BadCheckpoint, Classifier
from visits import MAX_BODY, RETRY_AFTER, Capacity

MAX_WAITING = 16  # requests; more are told to come back later


class Refusal(Exception):
    """A request that gets no answer but a status code and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@cache
def load_classifier() -> Classifier:
    """The checkpoint, read once."""
    torch.set_num_threads(1)  # requests at once keep the cores busy
    return Classifier.load()


@cache
def cores() -> anyio.CapacityLimiter:
    """One request per core at a time."""
    return anyio.CapacityLimiter(os.cpu_count() or 1)


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
    return [(upload.filename or "", await upload.read()) for upload in uploads]


def answer(name: str, data: bytes, *, with_overlay: bool) -> dict[str, Any]:
    """One picture's part of the response."""
    classifier = load_classifier()
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
        row["overlay_png"] = base64.b64encode(answer_png(classifier, picture, explanation)).decode()
    return row


async def classify(request: Request) -> Response:
    """POST /api/classify."""
    try:
        wanted = request.query_params.get("overlays", "false")
        if wanted not in ("true", "false"):
            raise Refusal(422, "overlays is true or false.")
        if cores().statistics().tasks_waiting >= MAX_WAITING:
            raise Refusal(429, "Too many requests are waiting. Try again in a few seconds.")
        uploads = await read_uploads(request)
        rows = [
            await anyio.to_thread.run_sync(partial(answer, *upload, with_overlay=wanted == "true"), limiter=cores())
            for upload in uploads
        ]
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
                                "description": "Whether to send each picture under its heatmap, too",
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


routes = (Route("/api/classify", classify, methods=["POST"]), Route("/api/openapi.json", describe))
app = st.App("app.py", routes=list(routes), middleware=[Middleware(Capacity)])
