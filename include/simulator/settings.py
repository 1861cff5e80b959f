"""What one simulator runs with; all times are seconds of real time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from include.simulator.dialects import OPENAI, Dialect


@dataclass(frozen=True)
class Timing:
    """How long a batch stays in each status before its work of that status is done."""

    validating: float = 0.2
    in_progress: float = 0.6
    finalizing: float = 0.2
    cancelling: float = 0.2

    @property
    def instant(self) -> bool:
        """True when no status takes any time."""
        return not (self.validating or self.in_progress or self.finalizing)


@dataclass(frozen=True)
class Limits:
    """The published limits of the Batch API (requests, bytes and embedding inputs per batch)."""

    requests_per_batch: int = 50_000
    bytes_per_batch: int = 200_000_000
    bytes_per_file: int = 512_000_000
    embedding_inputs: int = 50_000


@dataclass(frozen=True)
class Settings:
    """Everything that a simulator is told at its start."""

    state: Path
    timing: Timing = field(default_factory=Timing)
    limits: Limits = field(default_factory=Limits)
    workers: int = 1
    cache_from_tokens: int = 1024
    keep_order: bool = False
    key: str | None = None  #: the only API key that is taken; None: any but those of KeyCheck
    dialect: Dialect = OPENAI
    deployments: Mapping[str, str] = field(default_factory=dict)  #: own name -> model
