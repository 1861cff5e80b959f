"""What an error of the SDK means for a run: which of our errors it becomes."""

from __future__ import annotations

import openai

from include.errors import (
    ConfigurationError,
    InputFileNotReadyError,
    LLMBatchError,
    NotOfferedError,
    NotThereError,
    PermanentError,
    RateLimitedError,
    TokenLimitError,
    TransientError,
    UnknownOutcomeError,
)
from include.provider import OPENAI, ProviderProfile

MISSING_FILE = ("file_not_found", "invalid_file_id", "no_such_file")
NOT_OFFERED = (405, 501)  # HTTP: the server has no such call


def translate(
    error: openai.OpenAIError, action: str, *, repeatable: bool, profile: ProviderProfile = OPENAI
) -> LLMBatchError:
    """Return our error for one of the SDK's: status, code and request id, never the message.

    The API's messages may repeat input text or a part of the key. A call that may have taken
    effect and must not be repeated blindly (`repeatable=False`) becomes `UnknownOutcomeError`.
    """
    if isinstance(error, openai.APIStatusError):
        return _status_error(error, action, repeatable=repeatable, profile=profile)
    if isinstance(error, openai.APIConnectionError):
        cause = type(error.__cause__).__name__ if error.__cause__ else type(error).__name__
        was_sent = cause not in {"ConnectError", "ConnectTimeout", "UnsupportedProtocol"}
        if was_sent and not repeatable:
            return UnknownOutcomeError(f"{action}: the answer was lost ({cause}).")
        return TransientError(
            f"{action}: no answer from the API ({cause}). Check the network and the host of the "
            "connection if this lasts."
        )
    return PermanentError(f"{action}: the client refused ({type(error).__name__}).")


def _status_error(
    error: openai.APIStatusError, action: str, *, repeatable: bool, profile: ProviderProfile
) -> LLMBatchError:
    status, code = error.status_code, str(error.code or error.type or "no code")
    what = f"{action}: HTTP {status}, {code}, request {error.request_id or 'without id'}"
    if status in {401, 403}:
        return ConfigurationError(
            f"{what}. The API key of the connection was refused; nothing was sent. Correct the "
            "connection's password and clear this task."
        )
    if status == 402 or profile.is_out_of_credit(code):
        return PermanentError(f"{what}. The account is out of credit; nothing was sent.")
    if profile.is_quota(code, error.message):
        return TokenLimitError(
            f"{what}. The enqueued-token limit is reached.", retry_after=_retry_after(error)
        )
    if status in NOT_OFFERED:
        return NotOfferedError(f"{what}. The server does not offer this call.")
    if _is_missing_file(error, action):
        return InputFileNotReadyError(f"{what}. The uploaded file is not known yet.")
    if status == 404:
        return NotThereError(f"{what}. It does not exist, or belongs to another project's key.")
    if status == 429:
        return RateLimitedError(f"{what}. Too many requests.", retry_after=_retry_after(error))
    if status in {408, 409} or status >= 500:
        if not repeatable:
            return UnknownOutcomeError(f"{what}. It may have taken effect.")
        return TransientError(f"{what}.", retry_after=_retry_after(error))
    return PermanentError(f"{what}. The API refused; a retry would be refused again.")


def _is_missing_file(error: openai.APIStatusError, action: str) -> bool:
    if not action.startswith("Creating") or error.status_code not in {400, 404}:
        return False
    text = str(error.message).lower()
    return str(error.code) in MISSING_FILE or ("file" in text and "find" in text)


def _retry_after(error: openai.APIStatusError) -> float | None:
    try:
        return float(error.response.headers["retry-after"])
    except (KeyError, ValueError):
        return None
