"""Errors by recovery: the class says what to do next.

LLMBatchError
├── ConfigurationError     a person must mend a file, a connection or a setting; a retry cannot help
│   └── JobSpecError       the job folder is wrong
├── PermanentError         the API or the database refused; a retry would be refused again
│   ├── NotThereError      the API answers 404
│   ├── NotOfferedError    the server has no such call
│   └── BudgetExceededError the run would cost more than the job may spend; nothing was submitted
├── TransientError         try the same thing again later
│   ├── TokenLimitError, RateLimitedError     a limit is reached: back off
│   ├── PartitionBusyError                    another run of the partition asks the same
│   └── InputFileNotReadyError                the uploaded file is not known yet
├── UnknownOutcomeError    the request may have taken effect: look before trying again
├── CanaryError            the first, small batch came out badly; the rest was not submitted
├── DataError              one row or one line is wrong; the others go on
│   ├── RequestRefusedError a request of the queue is wrong, or its id stands for another one
│   └── UnknownRequestError the queue has no request with this id
└── FailureRateError       everything good is loaded, but more rows failed than the job allows

Messages name the job, file, key, row key or batch, what was expected and what to do.
They never contain row text, prompts, model answers or keys.
"""

from __future__ import annotations


class LLMBatchError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigurationError(LLMBatchError):
    """A file, a connection or a setting is wrong; a person has to mend it."""


class JobSpecError(ConfigurationError):
    """A job folder cannot be used as it stands."""


class PermanentError(LLMBatchError):
    """The other side refused, and would refuse again."""


class BudgetExceededError(PermanentError):
    """The estimate is above a budget of the run or of its month; nothing was submitted."""


class TransientError(LLMBatchError):
    """The other side could not answer now; the same call may succeed later.

    `retry_after` is the number of seconds that the other side asked for, if it did.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnknownOutcomeError(LLMBatchError):
    """The call may or may not have taken effect; reconcile before calling again."""


class CanaryError(LLMBatchError):
    """The canary failed too often or cost too much; the rest of the run was not submitted."""


class DataError(LLMBatchError):
    """One row or one line cannot be used; the others go on."""


class RequestRefusedError(DataError):
    """A request of the queue cannot be taken as it is; nothing was stored of it."""


class UnknownRequestError(DataError):
    """The queue has no request with this id."""


class FailureRateError(LLMBatchError):
    """More rows failed than `alert.failure_rate` allows; everything good has been loaded."""


class TokenLimitError(TransientError):
    """The enqueued-token limit of the model is reached; the same file can be sent later."""


class RateLimitedError(TransientError):
    """HTTP 429: nothing was done, the same call is welcome later."""


class PartitionBusyError(TransientError):
    """Another run of the partition asks the same and is at work; nothing was submitted."""


class InputFileNotReadyError(TransientError):
    """The API does not know the uploaded file yet; it usually does a moment later."""


class NotThereError(PermanentError):
    """The API answers 404: the batch or file does not exist for this key."""


class NotOfferedError(PermanentError):
    """The server has no such call (HTTP 405 or 501, or its provider's profile says so)."""
