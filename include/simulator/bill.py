"""The simulator's own bill: every answer with status 200 is paid for, at its own price table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from include.simulator.records import BatchRecord
from include.simulator.store import Store

PRICES: dict[str, Any] = orjson.loads(Path(__file__).with_name("prices.json").read_bytes())
MILLION = Decimal(PRICES["per_tokens"])
DISCOUNT = Decimal(PRICES["batch_discount"])
BLOCK = 1000
KINDS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")


def price_of(model: str | None) -> dict[str, str] | None:
    """The prices of a model or of the model that it is a dated version of, None when unknown."""
    models: dict[str, dict[str, str]] = PRICES["models"]
    known = [name for name in models if model == name or str(model).startswith(f"{name}-20")]
    return models[max(known, key=len)] if known else None


def cost(model: str | None, *, fresh: int, cached: int, output: int) -> Decimal | None:
    """US dollars at batch price for so many tokens; None when the model has no price."""
    price = price_of(model)
    if price is None:
        return None
    kinds = ((fresh, "input"), (cached, "cached"), (output, "output"))
    return sum((n * Decimal(price[kind]) for n, kind in kinds), Decimal(0)) * DISCOUNT / MILLION


def batched(items: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    """The items in lists of at most `size`."""
    waiting = iter(items)
    while block := list(islice(waiting, size)):
        yield block


class Bill:
    """Reads the bill out of the store."""

    def __init__(self, store: Store, deployments: Mapping[str, str] | None = None) -> None:
        self._store = store
        self._models = deployments or {}

    def total(self) -> dict[str, Any]:
        """All batches together and each by itself; costs are decimal texts in US dollars."""
        by_batch = [self._batch_bill(batch) for batch in reversed(self._store.batches())]
        costs = [Decimal(one["cost_usd"]) for one in by_batch if one["cost_usd"] is not None]
        return {
            "batches": len(by_batch),
            "requests": sum(one["requests"] for one in by_batch),
            "error_lines": sum(one["error_lines"] for one in by_batch),
            **{kind: sum(one[kind] for one in by_batch) for kind in KINDS},
            "cost_usd": f"{sum(costs, Decimal(0)):f}",
            "unpriced_requests": sum(
                one["requests"] for one in by_batch if one["cost_usd"] is None
            ),
            "by_batch": by_batch,
        }

    def lines(self, batch_id: str | None = None) -> Iterator[bytes]:
        """NDJSON, one object per (batch, custom_id): how often it was billed and how often not.

        Comes in blocks of whole lines.
        """
        for batch in reversed(self._store.batches()):
            if batch_id in (None, batch.id):
                for block in batched(self._batch_lines(batch), BLOCK):
                    yield b"".join(block)

    def _batch_lines(self, batch: BatchRecord) -> Iterator[bytes]:
        shared = {"batch_id": batch.id, "metadata": batch.tags, "model": batch.model}
        sql = (
            "SELECT custom_id, sum(status = 200) AS billed, sum(status <> 200) AS errors,"
            " sum(input_tokens) AS input_tokens, sum(cached_tokens) AS cached_tokens,"
            " sum(output_tokens) AS output_tokens, sum(reasoning_tokens) AS reasoning_tokens"
            " FROM bill_line WHERE batch_no = ? GROUP BY custom_id"
        )
        for row in self._store.stream(sql, (batch.no,)):
            line = dict(zip(row.keys(), tuple(row), strict=True))
            paid = cost(
                self._model(batch),
                fresh=line["input_tokens"] - line["cached_tokens"],
                cached=line["cached_tokens"],
                output=line["output_tokens"],
            )
            text = None if paid is None else f"{paid:f}"
            yield orjson.dumps({**line, **shared, "cost_usd": text}) + b"\n"

    def _model(self, batch: BatchRecord) -> str | None:
        """The model behind a deployment's name."""
        return self._models.get(batch.model or "", batch.model or "") or None

    def _batch_bill(self, batch: BatchRecord) -> dict[str, Any]:
        paid = cost(
            self._model(batch),
            fresh=batch.input_tokens - batch.cached_tokens,
            cached=batch.cached_tokens,
            output=batch.output_tokens,
        )
        if batch.billed == 0:
            paid = Decimal(0)
        return {
            "batch_id": batch.id,
            "status": batch.status,
            "metadata": batch.tags,
            "model": batch.model,
            "endpoint": batch.endpoint,
            "requests": batch.billed,
            "error_lines": batch.error_lines,
            **{kind: getattr(batch, kind) for kind in KINDS},
            "cost_usd": None if paid is None else f"{paid:f}",
        }
