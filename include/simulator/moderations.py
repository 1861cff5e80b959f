"""Moderation results: flagged by the words of a text, with scores that depend on it alone."""

from __future__ import annotations

from typing import Any

from include.simulator.prompts import IMAGES, input_texts, text_number
from include.simulator.schema_values import words_in

CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "sexual",
    "sexual/minors",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "violence",
    "violence/graphic",
)
WORDS = {
    "harassment": {"idiot", "idiots", "moron", "morons", "stupid", "clowns", "pathetic"},
    "harassment/threatening": {"regret", "find"},
    "hate": {"vermin"},
    "violence": {"kill", "punch", "smash", "hurt", "burn"},
    "illicit": {"counterfeit", "stolen"},
}
FLAGGED_FROM = 0.5
FOR_IMAGES = frozenset(
    {
        "sexual",
        "self-harm",
        "self-harm/intent",
        "self-harm/instructions",
        "violence",
        "violence/graphic",
    }
)


def moderated(value: Any) -> list[dict[str, Any]]:
    """One result for each input; a list of parts (text and images) is one input."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        has_image = any(part.get("type") in IMAGES for part in value)
        return [_result(" ".join(input_texts(value)), has_image=has_image)]
    return [_result(text, has_image=False) for text in input_texts(value)]


def _result(text: str, *, has_image: bool) -> dict[str, Any]:
    number, words = text_number(text, 0), set(words_in(text))
    scores = {
        name: round(
            (number >> at & 255) / 4096 + (0.75 if words & WORDS.get(name, set()) else 0), 6
        )
        for at, name in enumerate(CATEGORIES)
    }
    categories = {name: score >= FLAGGED_FROM for name, score in scores.items()}
    return {
        "flagged": any(categories.values()),
        "categories": categories,
        "category_scores": scores,
        "category_applied_input_types": {
            name: ["text", "image"] if has_image and name in FOR_IMAGES else ["text"]
            for name in CATEGORIES
        },
    }
