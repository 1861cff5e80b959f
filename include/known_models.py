"""What is known of OpenAI's models by name: which endpoint they serve, how long their vectors are.

Source: the model pages of the API documentation. A name that is not known here (a deployment, a
model of another server) is never refused.
"""

from __future__ import annotations

import re

EMBEDDINGS = "/v1/embeddings"
MODERATIONS = "/v1/moderations"
COMPLETIONS = "/v1/completions"
TEXTS = ("/v1/responses", "/v1/chat/completions")
IMAGES = ("/v1/images/generations", "/v1/images/edits")

VECTOR_SIZES = {
    "text-embedding-3-small": 1_536,
    "text-embedding-3-large": 3_072,
    "text-embedding-ada-002": 1_536,
}
FIXED_SIZE = frozenset({"text-embedding-ada-002"})  # takes no `dimensions`

_DATED = r"(-\d{4}-\d{2}-\d{2})?"
_SERVED = tuple(
    (re.compile(pattern), endpoints)
    for pattern, endpoints in (
        (r"text-embedding-(3-small|3-large|ada-002)", (EMBEDDINGS,)),
        (rf"(omni|text)-moderation-(latest|stable|007){_DATED}", (MODERATIONS,)),
        (rf"omni-moderation{_DATED}", (MODERATIONS,)),
        (r"gpt-3\.5-turbo-instruct(-0914)?|davinci-002|babbage-002", (COMPLETIONS,)),
        (r"gpt-image-1(-mini|\.5)?|dall-e-[23]", (*TEXTS[:1], *IMAGES)),
        (r"sora-2(-pro)?", ("/v1/videos",)),
        (rf"(gpt-(4o|4\.1|5|5\.\d)|o[134])(-mini|-nano|-pro)?{_DATED}", TEXTS),
    )
)


def served_by(model: str) -> tuple[str, ...] | None:
    """Return the endpoints that serve `model`; None when the name is not known."""
    return next((urls for pattern, urls in _SERVED if pattern.fullmatch(model)), None)
