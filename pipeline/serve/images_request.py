"""What a client may ask for: the body of POST /v1/images/generations, as OpenAI has it and with keys of ours; and how a
request is refused, in OpenAI's form."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Le, MaxLen, MinLen
from typing_extensions import TypedDict

from export.documents import Rules, check_json, shown, validated
from export.errors import RecipeError
from pipeline.generate.conditioning import MOST_GUIDANCE
from pipeline.generate.draw import DrawRequest
from pipeline.recipe import MOST_SEED
from pipeline.text_to_image import Pipeline

PATH = "/v1/images/generations"
MOST_BODY_BYTES = 64 << 10
# Of one request. OpenAI's own limits, but for steps; a bundle whose own are more is drawn with those.
MOST_PICTURES, MOST_CHARACTERS, MOST_STEPS = 10, 4000, 200
SEEDS = 2**32  # that are drawn where a request names none
RULES = Rules(RecipeError, "see /openapi.json", extra="forbid")


class ImagesRequest(TypedDict):
    """Keys whose only value is one of two say what is drawn in any case. user: taken and left alone.

    negative_prompt, steps, guidance and seed (of the first picture, the next has seed + 1) are not OpenAI's. How many
    steps there may be goes by the pipeline: see `most_steps`.
    """

    prompt: Annotated[str, MinLen(1), MaxLen(MOST_CHARACTERS)]
    model: NotRequired[str | None]
    n: NotRequired[Annotated[int, Ge(1), Le(MOST_PICTURES)] | None]
    size: NotRequired[str | None]
    response_format: NotRequired[Literal["b64_json", "url"] | None]
    stream: NotRequired[bool | None]
    partial_images: NotRequired[Annotated[int, Ge(0), Le(MOST_STEPS)] | None]
    output_format: NotRequired[Literal["png"] | None]
    quality: NotRequired[Literal["auto", "standard"] | None]
    background: NotRequired[Literal["auto", "opaque"] | None]
    moderation: NotRequired[Literal["auto", "low"] | None]
    user: NotRequired[Annotated[str, MaxLen(MOST_CHARACTERS)] | None]
    negative_prompt: NotRequired[Annotated[str, MaxLen(MOST_CHARACTERS)] | None]
    steps: NotRequired[Annotated[int, Ge(1)] | None]
    guidance: NotRequired[Annotated[float, Ge(0), Le(MOST_GUIDANCE)] | None]
    seed: NotRequired[Annotated[int, Ge(0), Le(MOST_SEED - 1)] | None]


def most_steps(pipeline: Pipeline) -> int:
    """That a client may ask for."""
    return max(MOST_STEPS, pipeline.n_steps)


def schema(pipeline: Pipeline) -> dict[str, Any]:
    """The JSON schema of a request, with all bounds."""
    from pydantic import TypeAdapter

    document = TypeAdapter(ImagesRequest).json_schema()
    whole, _ = document["properties"]["steps"]["anyOf"]  # a number, or null
    whole["maximum"] = most_steps(pipeline)
    return document


class ApiError(Exception):
    """A request that is answered with an error: `status` of HTTP, and OpenAI's type, code and param."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s
        self.fields = {"message": message, "type": kind, "param": param, "code": code}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


@dataclass(frozen=True)
class Asked:
    """What a request asks for, with everything stated. preview_steps: after how many steps there are previews.
    warnings: sentences on what of it is left out."""

    request: DrawRequest
    by_url: bool
    stream: bool
    preview_steps: frozenset[int]
    warnings: tuple[str, ...]


def read(body: bytes, pipeline: Pipeline) -> Asked:
    """The request in a body. Raises ApiError, or RecipeError, for what it may not say or the model cannot draw."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not in UTF-8 ({error.reason} at byte {error.start}); send JSON") from error
    fields = validated(check_json(text, "the request", RULES), "the request", ImagesRequest, RULES)
    model, size = fields.get("model"), fields.get("size") or "auto"
    if model not in (None, pipeline.name):
        message = f"model {shown(model)} is not here; this server draws with {pipeline.name}"
        raise ApiError(404, message, code="model_not_found", param="model")
    own = f"{pipeline.width}x{pipeline.height}"
    if size not in ("auto", own):
        raise ApiError(400, f"size {shown(size)}; the engine draws {own}, ask for that or auto", param="size")
    steps, guidance, seed = fields.get("steps"), fields.get("guidance"), fields.get("seed")
    n_steps = pipeline.n_steps if steps is None else steps
    if n_steps > most_steps(pipeline):
        raise ApiError(400, f"steps {shown(n_steps)}; this server makes at most {most_steps(pipeline)}", param="steps")
    negative = fields.get("negative_prompt")
    request = DrawRequest(
        (fields["prompt"],),
        secrets.randbelow(SEEDS) if seed is None else seed,
        fields.get("n") or 1,
        n_steps,
        pipeline.guidance_scale if guidance is None else guidance,
        (negative,) if negative else (),
    )
    pipeline.check(request)
    by_url, stream = fields.get("response_format") == "url", bool(fields.get("stream"))
    previews = fields.get("partial_images") or 0
    if previews and not stream:
        raise ApiError(400, f"partial_images {previews} without stream; set stream to true", param="partial_images")
    if by_url and stream:
        raise ApiError(400, "response_format url with stream; a stream has b64_json alone", param="response_format")
    shown_after = spread(previews, pipeline.model.calls(n_steps))
    return Asked(request, by_url, stream, shown_after, pipeline.warnings(request))


def spread(previews: int, n_steps: int) -> frozenset[int]:
    """After how many steps so many previews are shown: evenly, and never after the last step, which gives the picture.

    >>> sorted(spread(3, 20)), sorted(spread(200, 4)), sorted(spread(0, 4))
    ([5, 10, 15], [1, 2, 3], [])
    """
    shown_steps = {round(n_steps * (i + 1) / (previews + 1)) for i in range(previews)}
    return frozenset(shown_steps & set(range(1, n_steps)))
