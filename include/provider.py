"""How one provider's Batch API differs from another's, as data: this is the only place.

The Airflow connection chooses the profile: `provider` in its extra, or else its host. Extra may
also say `models` (own model or deployment name -> the model whose price counts) and
`provider_options` (fields of the profile that this server needs otherwise).

Sources: OpenAI's API reference (Files, Batch); Azure OpenAI's page on batch deployments and its
v1 reference; answers of servers in the wild. `docs/providers.md` shows the table to people.

DAG files import this module by way of others: it needs the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any
from urllib.parse import quote, urlsplit

from include.batch_status import normal
from include.errors import ConfigurationError

MAX_REQUESTS = 50_000  # per batch
MAX_BYTES = 200_000_000  # per request file
VERSION = "/v1"  # how this project spells endpoints, in jobs and in the ledger
TOKEN_LIMIT = "token_limit_exceeded"  # noqa: S105  # the code of a full token queue


@dataclass(frozen=True)
class ProviderProfile:
    """What a server takes and how it answers; `codes` are those of errors, in small letters.

    `line_prefix` and `create_prefix` stand in place of `/v1` in a request line's `url` and in the
    `endpoint` of a batch. `endpoints` are those that it batches; none says that it may take all.
    """

    name: str
    line_prefix: str = VERSION
    create_prefix: str = VERSION
    endpoints: tuple[str, ...] = ()
    requests_per_batch: int = MAX_REQUESTS
    bytes_per_batch: int = MAX_BYTES
    expires_files: bool = True  #: takes `expires_after` and `output_expires_after`
    takes_metadata: bool = True  #: whether it keeps and returns it is found out by looking
    lists_batches: bool = True
    newest_first: bool = True  #: the listing may be left at the first batch that is too old
    deadline_hours: float = 26.0  #: after which a batch is cancelled
    quota_codes: tuple[str, ...] = (TOKEN_LIMIT,)  #: to be waited out
    credit_codes: tuple[str, ...] = ()  #: no money left: waiting does not help
    statuses: Mapping[str, str] = field(default_factory=dict)  #: own word -> the API's word
    batch_page: str = ""  #: where people see a batch: a web address, the id follows
    models: Mapping[str, str] = field(default_factory=dict)  #: own name -> the model that is priced

    def line_url(self, endpoint: str) -> str:
        """Return the `url` of a request line, for an endpoint such as `/v1/responses`."""
        return self.line_prefix + endpoint.removeprefix(VERSION)

    def endpoint(self, line_url: str) -> str:
        """Return the endpoint that a request line's `url` means, spelled as `/v1/responses`."""
        known = (self.line_prefix, self.create_prefix, VERSION)
        prefix = next((one for one in sorted(known, key=len, reverse=True)
                       if line_url.startswith(f"{one}/")), "")  # fmt: skip
        return VERSION + line_url.removeprefix(prefix)

    def create_endpoint(self, endpoint: str) -> str:
        """Return the `endpoint` with which a batch is created."""
        return self.create_prefix + endpoint.removeprefix(VERSION)

    def status(self, word: str | None) -> str:
        """Return a batch's status in the words of the published API."""
        found = normal(word)
        return self.statuses.get(found, found)

    def priced_model(self, model: str) -> str:
        """Return the model whose price counts for `model`, usually itself."""
        return self.models.get(model, model)

    def page_of(self, batch_id: str | None) -> str:
        """Return the web page of a batch; empty when the provider is not known to have one."""
        return self.batch_page + quote(batch_id, safe="") if self.batch_page and batch_id else ""

    def is_quota(self, code: str | None, message: str | None = None) -> bool:
        """Tell whether an error means that the queue is full and the same call is welcome later."""
        found = (code or "").lower()
        in_words = "enqueued token" in (message or "").lower()
        return in_words or any(one in found for one in self.quota_codes)

    def is_out_of_credit(self, code: str | None) -> bool:
        """Tell whether an error means that the account cannot pay."""
        return (code or "").lower() in self.credit_codes

    def check_endpoint(self, endpoint: str, conn_id: str) -> None:
        """Raise `ConfigurationError` for an endpoint that the server does not batch."""
        if self.endpoints and endpoint not in self.endpoints:
            raise ConfigurationError(
                f"Connection {conn_id} leads to a server of provider {self.name}, which takes "
                f"batches of {', '.join(self.endpoints)}, but the job asks for {endpoint}. Nothing "
                "was sent. Choose another endpoint or connection; a server that does take it says "
                'so in the connection\'s extra: {"provider_options": {"endpoints": ["…"]}}.'
            )


OUT_OF_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
OPENAI = ProviderProfile(
    "openai",
    credit_codes=OUT_OF_CREDIT,
    batch_page="https://platform.openai.com/batches/",
)
AZURE = ProviderProfile(
    "azure",
    create_prefix="",
    endpoints=("/v1/chat/completions", "/v1/responses"),
    newest_first=False,  # no order is promised
    deadline_hours=74.0,  # batches do not expire; three days, and two hours
    quota_codes=(TOKEN_LIMIT, "insufficient_quota", "quota_exceeded"),
)
COMPATIBLE = ProviderProfile(
    "compatible",
    expires_files=False,
    newest_first=False,
    credit_codes=OUT_OF_CREDIT,
)
PROFILES: Mapping[str, ProviderProfile] = {
    profile.name: profile for profile in (OPENAI, AZURE, COMPATIBLE)
}
OPENAI_HOSTS = ("api.openai.com",)
AZURE_HOSTS = ("openai.azure.com", "cognitiveservices.azure.com", "services.ai.azure.com")
WEB = ("https://", "http://")
_CHOSEN = frozenset({"name", "models"})  # fields that `provider_options` must not set


def profile_of(extra: Mapping[str, Any], host: str | None, conn_id: str) -> ProviderProfile:
    """Return the profile of a connection.

    `host` is the address of its API, none for OpenAI's own. Raises `ConfigurationError` that names
    the connection for an extra that cannot be used.
    """
    name = extra.get("provider") or _detected(host)
    profile = PROFILES.get(name) if isinstance(name, str) else None
    if profile is None:
        raise _wrong(conn_id, "provider", name, f"one of {', '.join(PROFILES)}")
    models = extra.get("models") or {}
    if not _are_texts(models):
        raise _wrong(conn_id, "models", models, '{"my-deployment": "gpt-5-mini"}')
    if _detected(host) != profile.name:  # a gateway, or a simulator: its batches are elsewhere
        profile = replace(profile, batch_page="")
    return replace(profile, models=models, **_options(profile, extra, conn_id))


def _detected(host: str | None) -> str:
    if not host:
        return OPENAI.name
    found = (urlsplit(host if "://" in host else f"//{host}").hostname or "").lower()
    if any(found == known or found.endswith(f".{known}") for known in OPENAI_HOSTS):
        return OPENAI.name
    if any(found.endswith(f".{known}") for known in AZURE_HOSTS):
        return AZURE.name
    return COMPATIBLE.name


def _options(profile: ProviderProfile, extra: Mapping[str, Any], conn_id: str) -> dict[str, Any]:
    options = extra.get("provider_options") or {}
    known = {one.name: getattr(profile, one.name) for one in fields(profile)}
    if not isinstance(options, dict) or not set(options) <= set(known) - _CHOSEN:
        allowed = ", ".join(sorted(set(known) - _CHOSEN))
        raise _wrong(conn_id, "provider_options", options, f"a mapping with keys of {allowed}")
    page = options.get("batch_page", "")
    if page and not str(page).startswith(WEB):
        raise _wrong(conn_id, "provider_options.batch_page", page, "an address at https://")
    return {
        name: _converted(value, known[name], f"provider_options.{name}", conn_id)
        for name, value in options.items()
    }


def _converted(value: Any, usual: Any, key: str, conn_id: str) -> Any:
    """Return an option as the type that the field has."""
    if isinstance(usual, bool) and isinstance(value, bool):
        return value
    if isinstance(usual, str) and isinstance(value, str):
        return value
    if isinstance(usual, tuple) and isinstance(value, list) and all(map(_is_text, value)):
        return tuple(value)
    if isinstance(usual, Mapping) and _are_texts(value):
        return value
    is_number = isinstance(usual, int | float) and not isinstance(usual, bool)
    if is_number and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return type(usual)(value)
    raise _wrong(conn_id, key, value, f"a value such as {usual!r}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _wrong(conn_id: str, key: str, found: Any, expected: str) -> ConfigurationError:
    return ConfigurationError(
        f"Connection {conn_id}: `{key}` in its extra is {str(found)[:60]!r}; expected {expected}."
    )
