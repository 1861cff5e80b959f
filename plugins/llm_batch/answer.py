"""What a command of `python -m llm_batch` answers, and its exit code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OK = 0  #: all is well
LOOK = 1  #: something needs a look
FAILED = 3  #: it could not be done, the message says why (2: the command line is wrong)
DECLINED = 4  #: nothing was done, because nobody said yes


@dataclass(frozen=True)
class Answer:
    """What a command found: for machines, for people, and the exit code."""

    data: Any
    text: str
    code: int = OK
