"""Which profile a connection has, and what its differences mean."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from include.batch_api import view_of
from include.errors import ConfigurationError
from include.provider import AZURE, COMPATIBLE, OPENAI, PROFILES, ProviderProfile, profile_of


@pytest.mark.parametrize(
    ("host", "name"),
    [
        (None, "openai"),
        ("", "openai"),
        ("https://api.openai.com/v1", "openai"),
        ("https://eu.api.openai.com/v1", "openai"),
        ("api.openai.com", "openai"),
        ("https://ours.openai.azure.com/openai/v1/", "azure"),
        ("https://ours.services.ai.azure.com/openai/v1/", "azure"),
        ("https://LLM.example/v1", "compatible"),
        ("http://127.0.0.1:8765/v1", "compatible"),
        ("https://api.openai.com.evil.example/v1", "compatible"),
        ("https://notopenai.azure.com", "compatible"),
    ],
)
def test_the_host_tells_the_provider(host: str | None, name: str) -> None:
    """Only OpenAI's and Azure's own domains are theirs; all others are taken to differ."""
    assert profile_of({}, host, "llm").name == name


def test_the_extra_wins_over_the_host() -> None:
    """A gateway in front of OpenAI says so."""
    extra = {"provider": "openai", "models": {"house": "gpt-5.2"}}

    found = profile_of(extra, "https://gateway.example/v1", "llm")

    assert found.name == "openai"
    assert (found.priced_model("house"), found.priced_model("gpt-4.1")) == ("gpt-5.2", "gpt-4.1")


def test_options_change_single_fields() -> None:
    """What one server needs otherwise is said in its connection; types are those of the field."""
    options = {
        "requests_per_batch": 1_000,
        "lists_batches": False,
        "deadline_hours": 50,
        "create_prefix": "/api/v3",
        "endpoints": ["/v1/embeddings"],
        "statuses": {"succeeded": "completed"},
    }

    found = profile_of({"provider_options": options}, "https://llm.example", "llm")

    assert found.requests_per_batch == 1_000
    assert (found.lists_batches, found.deadline_hours) == (False, 50.0)
    assert found.create_endpoint("/v1/responses") == "/api/v3/responses"
    assert found.endpoints == ("/v1/embeddings",)
    assert found.status("Succeeded") == "completed"


@pytest.mark.parametrize(
    ("extra", "host", "page"),
    [
        ({}, None, "https://platform.openai.com/batches/batch%2F1"),
        ({}, "https://eu.api.openai.com/v1", "https://platform.openai.com/batches/batch%2F1"),
        ({"provider": "openai"}, "http://127.0.0.1:8765/v1", ""),
        ({}, "https://ours.openai.azure.com/openai/v1/", ""),
        ({}, "https://llm.example/v1", ""),
        (
            {"provider_options": {"batch_page": "https://llm.example/b/"}},
            "https://llm.example/v1",
            "https://llm.example/b/batch%2F1",
        ),
    ],
)
def test_a_batch_has_a_page_where_the_provider_has_one(
    extra: dict[str, Any], host: str | None, page: str
) -> None:
    """Never OpenAI's for a batch of another server; whoever has a page says where."""
    profile = profile_of(extra, host, "llm")

    assert profile.page_of("batch/1") == page
    assert profile.page_of(None) == ""


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"provider": "azur"}, "`provider` in its extra is 'azur'; expected one of openai, azure"),
        ({"provider": ["azure"]}, "`provider`"),
        ({"models": ["gpt-5.2"]}, "`models`"),
        ({"models": {"house": 5}}, "`models`"),
        ({"provider_options": {"list_batches": False}}, "keys of .*lists_batches"),
        ({"provider_options": {"name": "mine"}}, "`provider_options`"),
        ({"provider_options": {"batch_page": "javascript:alert(1)//"}}, "https://"),
        ({"provider_options": {"lists_batches": "no"}}, "`provider_options.lists_batches`"),
        ({"provider_options": {"lists_batches": 0}}, "`provider_options.lists_batches`"),
        ({"provider_options": {"requests_per_batch": "many"}}, "requests_per_batch"),
        ({"provider_options": {"requests_per_batch": 0}}, "requests_per_batch"),
        ({"provider_options": {"requests_per_batch": True}}, "requests_per_batch"),
        ({"provider_options": {"endpoints": "all"}}, "`provider_options.endpoints`"),
        ({"provider_options": [1]}, "a mapping with keys of"),
    ],
)
def test_a_wrong_extra_is_named(extra: dict[str, Any], said: str) -> None:
    """The error names the connection, the key, what was found and what was expected."""
    with pytest.raises(ConfigurationError, match=rf"^Connection my_llm: .*{said}"):
        profile_of(extra, None, "my_llm")


def test_how_endpoints_are_spelled() -> None:
    """Lines keep their /v1 everywhere; Azure creates batches without it."""
    chat = "/v1/chat/completions"

    assert [one.line_url(chat) for one in PROFILES.values()] == [chat] * 3
    assert OPENAI.create_endpoint(chat) == COMPATIBLE.create_endpoint(chat) == chat
    assert AZURE.create_endpoint(chat) == "/chat/completions"
    assert AZURE.endpoint("/chat/completions") == AZURE.endpoint(chat) == chat


def test_what_a_quota_is() -> None:
    """On Azure, `insufficient_quota` is a full queue; at OpenAI it is an empty account."""
    assert AZURE.is_quota("insufficient_quota")
    assert not AZURE.is_out_of_credit("insufficient_quota")
    assert not OPENAI.is_quota("insufficient_quota")
    assert OPENAI.is_out_of_credit("insufficient_quota")
    assert all(one.is_quota("Batch_Token_Limit_Exceeded") for one in PROFILES.values())
    assert COMPATIBLE.is_quota(None, "The enqueued token quota of this model is used up")
    assert not COMPATIBLE.is_quota("server_error", "Something else")


@pytest.mark.parametrize(
    "created",
    [1_796_000_000, 1_796_000_000_000, "2026-11-30T02:13:20Z", "1796000000"],
    ids=["seconds", "milliseconds", "text", "number as text"],
)
def test_times_are_read_in_any_unit(created: Any) -> None:
    """Seconds, milliseconds, ISO text."""
    found = view_of({"id": "b", "created_at": created}).created_at

    assert abs(found.timestamp() - 1_796_000_000) < 100_000


@pytest.mark.parametrize("created", [None, 0, "", "soon", -1, {}, 10**40], ids=repr)
def test_an_unknown_age_is_new(created: Any) -> None:
    """A batch whose creation is not told is never too old to be ours."""
    assert view_of({"id": "b", "created_at": created}).created_at.year >= 2026


def test_every_option_is_documented() -> None:
    """The table of docs/providers.md has each field that a connection may set."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "providers.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]

    documented = {row[-1].strip("`") for row in rows[1:] if row[-1].startswith("`")}
    assert documented == {one.name for one in fields(ProviderProfile)} - {"name", "models"}
