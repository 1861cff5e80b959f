"""Whether endpoint, model and params of a job fit together; said before anything is sent.

Only what is known to be wrong is refused: a param of another endpoint, a model by its full name, a
number of dimensions that a model does not have. What nobody knows goes to the API.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from include.known_models import (
    COMPLETIONS,
    EMBEDDINGS,
    FIXED_SIZE,
    IMAGES,
    MODERATIONS,
    VECTOR_SIZES,
    served_by,
)
from include.output_columns import AnswerShape

if TYPE_CHECKING:
    from include.job_spec import Request

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
WITH_IMAGES = (RESPONSES, CHAT, MODERATIONS)
ENCODINGS = ("base64", "float")
# Params that some endpoints have and others refuse, API reference of each.
PARAMS_OF: Mapping[str, tuple[str, ...]] = {
    "max_output_tokens": (RESPONSES,),
    "max_completion_tokens": (CHAT,),
    "max_tokens": (CHAT, COMPLETIONS),
    "instructions": (RESPONSES,),
    "reasoning": (RESPONSES,),
    "reasoning_effort": (CHAT,),
    "text": (RESPONSES,),
    "response_format": (CHAT, *IMAGES),
    "messages": (CHAT,),
    "dimensions": (EMBEDDINGS,),
    "encoding_format": (EMBEDDINGS,),
    "suffix": (COMPLETIONS,),
    "echo": (COMPLETIONS,),
    "best_of": (COMPLETIONS,),
    "size": (*IMAGES, "/v1/videos"),
    "quality": IMAGES,
    "seconds": ("/v1/videos",),
}
_KNOWN = frozenset(url for urls in PARAMS_OF.values() for url in urls) | {MODERATIONS}


def misfits(request: Request) -> list[str]:
    """Say what does not fit together in a request; empty when nothing is known to be wrong."""
    return [
        *_model_misfits(request.model, request.endpoint),
        *_param_misfits(request.params, request.endpoint),
        *_image_misfits(request),
        *(_vector_misfits(request) if request.shape is AnswerShape.VECTOR else ()),
    ]


def vector_length(model: str, params: Mapping[str, Any]) -> int | None:
    """Return how many numbers the vectors of a request have; None when nothing says so."""
    dimensions = params.get("dimensions")
    return dimensions if isinstance(dimensions, int) else VECTOR_SIZES.get(model)


def _model_misfits(model: str, endpoint: str) -> list[str]:
    served = served_by(model)
    if served is None or endpoint in served or endpoint not in _KNOWN:
        return []
    return [f"model {model} is for {' and '.join(served)}, not for {endpoint}"]


def _param_misfits(params: Mapping[str, Any], endpoint: str) -> list[str]:
    if endpoint not in _KNOWN:
        return []
    return [
        f"params: {name} is for {' and '.join(PARAMS_OF[name])}, not for {endpoint}"
        for name in params
        if name in PARAMS_OF and endpoint not in PARAMS_OF[name]
    ]


def _image_misfits(request: Request) -> list[str]:
    if not request.images:
        return []
    if request.endpoint not in WITH_IMAGES:
        return [f"{request.endpoint} takes no images; those that do: {', '.join(WITH_IMAGES)}"]
    return ["images are for a prompt; request.py puts them into its body"] * bool(request.builder)


def _vector_misfits(request: Request) -> list[str]:
    encoding = request.params.get("encoding_format", ENCODINGS[0])
    problems = []
    if encoding not in ENCODINGS:
        problems.append(f"params: encoding_format must be {' or '.join(ENCODINGS)}")
    return problems + _size_misfits(request, request.params.get("dimensions"))


def _size_misfits(request: Request, dimensions: object) -> list[str]:
    most = VECTOR_SIZES.get(request.priced_model)
    if dimensions is not None:
        if not isinstance(dimensions, int) or isinstance(dimensions, bool) or dimensions < 1:
            return ["params: dimensions must be a whole number from 1"]
        if request.priced_model in FIXED_SIZE:
            return [f"params: {request.model} takes no dimensions; its vectors have {most:,}"]
        if most and dimensions > most:
            return [f"params: dimensions is at most {most:,} for {request.model}"]
        most = dimensions
    if request.vector_size and most and request.vector_size != most:
        return [f"vector_size {request.vector_size:,}, but the vectors have {most:,} numbers"]
    if not (request.vector_size or most):
        why = f"how many numbers the vectors of {request.model} have"
        return [f"vector_size is missing: {why} (or params.dimensions, where the model takes it)"]
    return []
