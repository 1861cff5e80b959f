"""How the simulator differs when it plays another provider than OpenAI.

It knows nothing of the profiles of the code under test: both are written from what is published,
so that one can be held against the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VERSION = "/v1"


@dataclass(frozen=True)
class Dialect:
    """One way to speak Files and Batches."""

    name: str
    root: str = ""  #: path before /v1
    create_prefix: str = VERSION  #: before the `endpoint` of a batch
    line_prefixes: tuple[str, ...] = (VERSION,)  #: before the `url` of a line
    endpoints: frozenset[str] | None = None  #: all, when None
    takes_expiry: bool = True
    shortest_expiry: int = 3600  #: seconds
    expires: bool = True  #: whether batches have an `expires_at`
    keeps_metadata: bool = True
    page: int | None = None  #: batches per page whatever was asked for, and no `has_more`
    oldest_first: bool = False
    words: Mapping[str, str] = field(default_factory=dict)  #: statuses in its own words
    omits_nulls: bool = False
    empty_ids: bool = False  #: "" for a file that is not there
    long_ids: bool = False
    always_error_file: bool = False
    three_error_lines: bool = False

    def endpoint(self, wanted: str) -> str | None:
        """The endpoint that a batch is created for, with /v1; None when it is not taken."""
        path = wanted.removeprefix(self.create_prefix)
        if not wanted.startswith(f"{self.create_prefix}/") or path.startswith(f"{VERSION}/"):
            return None
        endpoint = VERSION + path
        return endpoint if self.endpoints is None or endpoint in self.endpoints else None

    def urls(self, endpoint: str) -> tuple[str, ...]:
        """What may stand in the lines of a batch."""
        return tuple(prefix + endpoint.removeprefix(VERSION) for prefix in self.line_prefixes)

    def shown(self, view: dict[str, Any]) -> dict[str, Any]:
        """A batch object of the published schema, as this provider writes it."""
        view["status"] = self.words.get(view["status"], view["status"])
        if not self.keeps_metadata:
            view["metadata"] = None
        if not self.expires:
            view["expires_at"] = None
        if self.empty_ids:
            for name in ("output_file_id", "error_file_id"):
                view[name] = view[name] or ""
            if view["status"] == "failed":
                view["request_counts"] = None
        if self.omits_nulls:
            return {name: value for name, value in view.items() if value is not None}
        return view


OPENAI = Dialect("openai")
AZURE = Dialect(
    "azure",
    root="/openai",
    create_prefix="",
    line_prefixes=(VERSION, ""),
    endpoints=frozenset({"/v1/chat/completions", "/v1/responses"}),
    shortest_expiry=1_209_600,
    expires=False,
    words={"cancelled": "canceled", "cancelling": "canceling"},
    empty_ids=True,
    always_error_file=True,
)
COMPATIBLE = Dialect(
    "compatible",
    takes_expiry=False,
    expires=False,
    keeps_metadata=False,
    page=3,
    oldest_first=True,
    words={
        "validating": "queued",
        "in_progress": "processing",
        "completed": "COMPLETED",
        "cancelled": "canceled",
    },
    omits_nulls=True,
    long_ids=True,
    three_error_lines=True,
)
DIALECTS: Mapping[str, Dialect] = {one.name: one for one in (OPENAI, AZURE, COMPATIBLE)}
