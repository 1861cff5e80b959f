"""Answers of the image and video endpoints, with one small picture for all prompts."""

from __future__ import annotations

from typing import Any

from include.simulator.prompts import Prompt

# A transparent PNG of one pixel.
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJg"
    "gg=="
)
TOKENS_OF_QUALITY = {"low": 272, "medium": 1_056, "high": 4_160}  # 1024x1024, guide "Images"


def picture(body: dict[str, Any], prompt: Prompt, created: int) -> dict[str, Any]:
    """The body of an image answer, in the shape of the schema `ImagesResponse`."""
    count = body.get("n") if isinstance(body.get("n"), int) else 1
    quality = body.get("quality") if body.get("quality") in TOKENS_OF_QUALITY else "medium"
    written = TOKENS_OF_QUALITY[str(quality)] * int(count or 1)
    return {
        "created": created,
        "background": "opaque",
        "data": [{"b64_json": PIXEL}] * int(count or 1),
        "output_format": body.get("output_format", "png"),
        "quality": quality,
        "size": body.get("size", "1024x1024"),
        "usage": {
            "input_tokens": prompt.tokens,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": prompt.tokens},
            "output_tokens": written,
            "total_tokens": prompt.tokens + written,
        },
    }


def video(body: dict[str, Any], unique: str, created: int) -> dict[str, Any]:
    """The body of a video answer, in the shape of the schema `VideoResource`."""
    return {
        "id": f"video_{unique}",
        "object": "video",
        "model": body["model"],
        "status": "completed",
        "progress": 100,
        "created_at": created,
        "completed_at": created,
        "expires_at": None,
        "error": None,
        "prompt": body.get("prompt"),
        "seconds": str(body.get("seconds", "4")),
        "size": body.get("size", "720x1280"),
        "remixed_from_video_id": None,
    }
