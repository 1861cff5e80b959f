"""What Airflow shows about a job's DAG: what it does, with what, and what it is likely to cost."""

from __future__ import annotations

import hashlib
from pathlib import Path

from include import cost
from include.errors import ConfigurationError
from include.figures import counted, dollars
from include.job_spec import JobSpec

README = "README.md"
LONGEST = 20_000  # characters of a README that are shown
BYTES_PER_TOKEN = 4  # as requests are estimated
ROWS = 1_000


def documentation(spec: JobSpec, root: Path) -> str:
    """Return Markdown about the job, with the README.md of its folder `root/<job>` if it has one.

    Reads nothing but the price files and that README: a DAG file calls it.
    """
    parts = [spec.description or f"Batch job {spec.name}.", _facts(spec), _readme(spec, root)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(spec: JobSpec) -> str:
    source, request, target = spec.source, spec.request, spec.target
    rows_from = source.conn_id if source.sql else source.origin
    place = f" on `{target.conn_id}`" if target.conn_id else " (Parquet)"
    budget = "none" if spec.budget.max_usd is None else f"${spec.budget.max_usd} a run"
    facts = (
        f"source: `{rows_from}`, key `{', '.join(source.key)}`",
        f"request: `{request.endpoint}` with `{request.model}` over `{request.conn_id}`",
        f"target: `{target.results_place}` and `{target.failures_place}`{place}",
        f"price: {_price(spec)}",
        f"at most {counted(spec.retry.rounds, 'round')}; budget {budget}",
        f"{_builder(spec)}; spec digest `{spec.digest[:12]}`",
    )
    return "\n".join(f"- {fact}" for fact in facts)


def _price(spec: JobSpec) -> str:
    """Return what is known before any row is: answers are taken to use half of their limit."""
    try:
        found = cost.price(spec.request.priced_model)
    except ConfigurationError as error:
        return f"unknown: {error}"
    if found is None:
        return f"unknown for `{spec.request.priced_model}`; add it to a price file"
    into, out = (f"${one * found.batch_discount:f}" for one in (found.input, found.output))
    likely = cost.estimate(
        spec.request.priced_model,
        input_tokens=_prompt_tokens(spec) * ROWS,
        requests=ROWS,
        params=spec.request.params,
    )
    rows = counted(ROWS, "row")
    expected = "" if likely is None else f"; about {dollars(likely.expected)} for {rows}"
    each = f"{into} for a million tokens in, {out} out (batch{_origin(found)})"
    return f"{each}{expected} and their own text"


def _origin(price: cost.Price) -> str:
    """Return where a price is from; without its age, which would change the DAG every day."""
    if not price.is_verified:
        return ", not verified"
    return "" if price.as_of is None else f", as of {price.as_of}"


def _prompt_tokens(spec: JobSpec) -> int:
    return len((spec.request.prompt or "").encode()) // BYTES_PER_TOKEN


def _builder(spec: JobSpec) -> str:
    if spec.request.prompt is None:
        digest = spec.request.builder.digest if spec.request.builder else ""
        return f"`request.py` digest `{digest[:12]}`"
    digest = hashlib.sha256(spec.request.prompt.encode()).hexdigest()
    return f"prompt `{spec.request.prompt_file}` digest `{digest[:12]}`"


def _readme(spec: JobSpec, root: Path) -> str:
    try:
        text = (root / spec.name / README).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
