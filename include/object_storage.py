"""Paths at a URI: s3, gs and whatever else fsspec opens, with errors that say what is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from include.errors import ConfigurationError

if TYPE_CHECKING:
    from upath import UPath

Remote = Callable[[str], Any]  #: makes a path object, usually a `UPath`, of a URI or a path


def remote_path(uri: str, **options: Any) -> UPath:
    """Return the path object of a URI; fsspec takes `options`, or finds credentials by itself.

    Nothing is read yet. Raises `ConfigurationError` for an unknown scheme and for a package that
    is not installed.
    """
    from upath import UPath

    try:
        path: UPath = UPath(uri, **options)
        path.fs  # noqa: B018  # the package of the scheme is imported here
    except (ImportError, ValueError, OSError) as error:
        raise ConfigurationError(unusable(uri, error)) from None
    return path


def unusable(uri: str, error: Exception) -> str:
    """Return what to tell about a URI whose file system cannot be used."""
    scheme = uri.partition("://")[0]
    if isinstance(error, ImportError):
        return f"{uri} cannot be opened: a package is missing on this machine. {_sentence(error)}"
    if isinstance(error, OSError):
        return f"{uri} cannot be opened: {_sentence(error)}"
    return (
        f"{uri} cannot be opened: {scheme}:// is no scheme that fsspec knows. Expected a path, "
        "file://, s3://, gs:// or another one of fsspec; check the spelling."
    )


def _sentence(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") + "."
