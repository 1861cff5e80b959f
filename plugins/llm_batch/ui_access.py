"""Who may see and do what on our pages, and what keeps others from doing it in their name.

Airflow mounts a plugin's app without any login. Every route here asks Airflow who the user is, and
Airflow's auth manager whether they may: reading needs GET on the DAG's runs, row text also its
code and its XComs, cancelling and closing PUT and redriving POST on its runs, as in Airflow's own
API.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from typing import Annotated, Any
from urllib.parse import urlsplit

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.api_fastapi.core_api.security import GetUserDep, get_user
from airflow.configuration import conf
from airflow.models.dag import DagModel
from fastapi import Depends, HTTPException, Query, Request, Response, status
from itsdangerous import BadSignature, SignatureExpired, URLSafeTimedSerializer

from llm_batch.views import PREFIX

COOKIE = "llm_batch_form"
COOKIE_BYTES = 32
TOKEN_LIFE = 3_600  # seconds from the question to the answer
SALT = "llm_batch.ui"
LONGEST_ID = 250  # characters of a DAG's or a run's id

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'self'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    # With no-referrer, a browser would send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-store",
}

LoggedIn = Depends(get_user)
DagId = Annotated[str, Query(min_length=1, max_length=LONGEST_ID)]
RunId = Annotated[str, Query(min_length=1, max_length=LONGEST_ID)]
Id = Annotated[str, Query(pattern=r"^[0-9a-f]{32}$")]  # of the ledger: a run's or a submission's
OptionalId = Annotated[str | None, Query(pattern=r"^[0-9a-f]{32}$")]


async def with_headers(
    request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    """Add the security headers to whatever is answered, errors included."""
    response = await call_next(request)
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def may(user: Any, dag_id: str, method: Any, entity: DagAccessEntity | None) -> bool:
    """Ask Airflow whether the user may do this to the DAG."""
    details = DagDetails(id=dag_id, team_name=DagModel.get_team_name(dag_id))
    return bool(
        get_auth_manager().is_authorized_dag(
            method=method, access_entity=entity, details=details, user=user
        )
    )


def may_read_rows(user: Any, dag_id: str) -> bool:
    """Whether the user may see the text of rows: who reads the DAG's code and data may."""
    return all(
        may(user, dag_id, "GET", entity) for entity in (DagAccessEntity.CODE, DagAccessEntity.XCOM)
    )


def may_cancel(user: Any, dag_id: str) -> bool:
    """Whether the user may end runs of the DAG."""
    return may(user, dag_id, "PUT", DagAccessEntity.RUN)


def may_redrive(user: Any, dag_id: str) -> bool:
    """Whether the user may trigger runs of the DAG."""
    return may(user, dag_id, "POST", DagAccessEntity.RUN)


def readable(user: Any) -> set[str]:
    """Return the ids of the DAGs that the user may read."""
    return set(get_auth_manager().get_authorized_dag_ids(user=user, method="GET"))


def _checked(allowed: Callable[[Any, str], bool], what: str) -> Any:
    def check(user: GetUserDep, dag_id: DagId) -> None:
        if not allowed(user, dag_id):
            raise HTTPException(
                status.HTTP_403_FORBIDDEN,
                f"You are logged in, but may not {what} this DAG. Whoever administers this "
                "Airflow can give you the permission.",
            )

    return Depends(check)


CanRead = _checked(
    lambda user, dag_id: may(user, dag_id, "GET", DagAccessEntity.RUN), "see the runs of"
)
CanReadRows = _checked(may_read_rows, "see the rows of")
CanCancel = _checked(may_cancel, "change runs of")
CanRedrive = _checked(may_redrive, "trigger runs of")


def form_token(request: Request, response: Response, user: Any, purpose: str) -> str:
    """Return a token for one form: for this user, browser, action and target, for an hour."""
    mark = request.cookies.get(COOKIE) or secrets.token_urlsafe(COOKIE_BYTES)
    response.set_cookie(
        COOKIE,
        mark,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        path=f"{base_path()}{PREFIX}",
    )
    return _serializer().dumps(_bound(user, mark, purpose))


def check_form(request: Request, user: Any, purpose: str, token: str) -> None:
    """Raise 403 unless the form is ours, from this user and browser, for exactly this purpose."""
    if not _is_own_origin(request):
        raise _refused("It came from another site.")
    mark = request.cookies.get(COOKIE, "")
    try:
        bound = _serializer().loads(token, max_age=TOKEN_LIFE)
    except SignatureExpired:
        raise _refused("The question is more than an hour old.") from None
    except BadSignature:
        raise _refused("Its token is not valid.") from None
    if not mark or not secrets.compare_digest(str(bound), _bound(user, mark, purpose)):
        raise _refused("Its token belongs to another user, browser or action.")


def _refused(why: str) -> HTTPException:
    return HTTPException(
        status.HTTP_403_FORBIDDEN,
        f"Nothing was done. {why} Go back, reload the page and try again.",
    )


def _bound(user: Any, mark: str, purpose: str) -> str:
    return hashlib.sha256(f"{user.get_id()}\0{mark}\0{purpose}".encode()).hexdigest()


def _serializer() -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(conf.get_mandatory_value("api", "secret_key"), salt=SALT)


def _is_own_origin(request: Request) -> bool:
    """Browsers send `Origin` with every POST; one that is missing or foreign is refused."""
    if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return False
    base = urlsplit(conf.get("api", "base_url", fallback=""))
    ours = {f"{request.url.scheme}://{request.headers.get('host', '')}"}
    if base.netloc:
        ours.add(f"{base.scheme}://{base.netloc}")
    return request.headers.get("origin") in ours


def base_path() -> str:
    """Return the path below which Airflow is served: empty, or such as `/airflow`."""
    return urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/")
