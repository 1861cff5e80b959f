"""Addresses of Airflow's own pages, spelled as its UI spells them."""

from __future__ import annotations

from urllib.parse import quote

# The UI writes these as they are in a path. It marks the tab whose address has the same text as
# the browser's, so `scheduled__2026-11-01T00:00:00+00:00` must not become `…T00%3A00%3A00%2B…`.
LEFT_AS_THEY_ARE = ":+@!$&'()*,;="


def part(text: str) -> str:
    """Return an id as one part of the path of a page."""
    return quote(text, safe=LEFT_AS_THEY_ARE)


def run_page(dag_id: str, run_id: str) -> str:
    """Return the path of the page of a run."""
    return f"/dags/{part(dag_id)}/runs/{part(run_id)}"
