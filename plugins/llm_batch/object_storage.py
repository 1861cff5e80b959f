"""Paths at a URI with the credentials of an Airflow connection: `s3://conn_id@bucket/folder`.

Airflow's own `ObjectStoragePath` is used where an installed provider knows the scheme. Without
one, fsspec opens the URI: by the credentials of the environment or, for S3, by a connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow.sdk import ObjectStoragePath
from airflow.sdk.io import has_fs

from include.errors import ConfigurationError
from include.object_storage import remote_path, unusable
from llm_batch import connections

if TYPE_CHECKING:
    from upath import UPath

S3_SCHEMES = ("s3", "s3a")


def storage_path(uri: str) -> UPath | ObjectStoragePath:
    """Return the path object of a URI, of which the part before `@` names a connection.

    Raises `ConfigurationError` for an unknown scheme, a missing package or connection.
    """
    scheme = uri.partition("://")[0]
    if has_fs(scheme):
        try:
            path = ObjectStoragePath(uri)
            path.fs  # noqa: B018  # the provider builds its file system here
        except (ImportError, ValueError) as error:
            raise ConfigurationError(unusable(uri, error)) from None
        return path
    conn_id, _, place = urlsplit(uri).netloc.rpartition("@")
    if not conn_id:
        return remote_path(uri)
    if scheme not in S3_SCHEMES:
        raise ConfigurationError(
            f"{uri} names the connection {conn_id!r}, but no Airflow provider for {scheme}:// is "
            "installed. Install it, or leave the name out and give the credentials to the "
            "environment of all workers."
        )
    return remote_path(uri.replace(f"{conn_id}@{place}", place, 1), **_s3_options(conn_id))


def _s3_options(conn_id: str) -> dict[str, Any]:
    """Return what s3fs takes from a connection of type `aws` (login, password, extra)."""
    connection = connections.connection(conn_id)
    extra = connection.extra_dejson
    return {
        "key": connection.login or None,
        "secret": connection.password or None,
        "token": extra.get("aws_session_token"),
        "endpoint_url": extra.get("endpoint_url") or None,
        "client_kwargs": {"region_name": extra.get("region_name")},
    }
