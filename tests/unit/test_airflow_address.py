"""Addresses of Airflow's pages."""

from __future__ import annotations

from urllib.parse import unquote

import pytest

from include.airflow_address import part, run_page


def test_a_run_is_addressed_as_airflow_does_it() -> None:
    """Airflow's UI compares addresses as text: it would not mark a tab behind `%2B`."""
    assert (
        run_page("tickets", "manual__2026-11-01T00:00:00+00:00")
        == "/dags/tickets/runs/manual__2026-11-01T00:00:00+00:00"
    )


@pytest.mark.parametrize("name", ["a/b", "a?b=1", "a#b", "100%", "a b", "ä", '"><script>', "../x"])
def test_no_id_leaves_its_part_of_the_path(name: str) -> None:
    """What would begin another part, a query or a tag is quoted, and read back whole."""
    assert not set(part(name)) & set('/?#" <>ä')
    assert unquote(part(name)) == name
