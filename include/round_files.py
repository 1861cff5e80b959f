"""The files that the rounds of a run leave for its load: outcomes, shared and left-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from include.artifacts import Artifacts
from include.budgets import LeftOutRound
from include.errors import ConfigurationError
from include.figures import counted
from include.ledger_records import Batch, Round, Run

if TYPE_CHECKING:
    from include.loading import RoundFiles

SHARED_FILE = "shared.parquet"  # beside the request files of round 1
REJECTED_FILE = "rejected.parquet"  # beside those of any round


def outcome_files(batches: list[Batch]) -> list[str]:
    """Return the outcome files of collected batches, in shard order."""
    return [one.outcomes_file for one in batches if one.outcomes_file is not None]


def round_files(
    run: Run,
    rounds: list[Round],
    batches: list[Batch],
    artifacts: Artifacts,
    *,
    over_budget: LeftOutRound | None = None,
) -> list[RoundFiles]:
    """Return the outcome files of each round, with the batches that they came from.

    The rows that are open before the round `over_budget` have failed for it.

    Raises `ConfigurationError` when a file of rows that were not sent themselves is lost: it would
    be noticed only when the other rows are loaded.
    """
    from include.loading import RoundFiles

    shared_file = _shared_file(run, batches, artifacts)
    collected = [one for one in batches if one.outcomes_file is not None]
    return [
        RoundFiles(
            round=one.round,
            outcome_files=tuple(outcome_files([b for b in collected if b.round == one.round])),
            batch_ids=tuple(str(b.batch_id) for b in collected if b.round == one.round),
            shared_file=shared_file,
            left_out_file=_left_out_file(run, one, rounds, batches, artifacts),
            over_budget=over_budget.text
            if over_budget is not None and over_budget.number == one.round + 1
            else None,
        )
        for one in rounds
    ]


def _shared_file(run: Run, batches: list[Batch], artifacts: Artifacts) -> str | None:
    """Return the file of rows that share an answer, as it belongs to the files that were sent."""
    path = beside(batches, 1, SHARED_FILE)
    if path is None or artifacts.exists(path):
        return path
    if not run.shared:
        return None
    raise _lost(
        run, path, f"which {counted(run.shared, 'row')} took the answer of another", artifacts
    )


def _left_out_file(
    run: Run, one: Round, rounds: list[Round], batches: list[Batch], artifacts: Artifacts
) -> str | None:
    after = next((other for other in rounds if other.round == one.round + 1), None)
    if after is None:
        return _kept_file(run, one, artifacts)
    count = max(one.retry - after.requests, 0)
    path = beside(batches, after.round, REJECTED_FILE)
    if not count or path is None:
        return None
    if artifacts.exists(path):
        return path
    raise _lost(run, path, f"why {counted(count, 'row')} could not be sent again", artifacts)


def _kept_file(run: Run, one: Round, artifacts: Artifacts) -> str | None:
    """Return what the round after this one has refused, when nothing of it was sent."""
    from include.left_out import kept_path

    path = kept_path(run.directory, one.round + 1)
    return path if one.retry and artifacts.exists(path) else None


def beside(batches: Sequence[Batch], number: int, name: str) -> str | None:
    """Return the path of a file that a build wrote beside the request files of a round."""
    first = next((one for one in batches if one.round == number), None)
    return None if first is None else f"{first.request_file.rpartition('/')[0]}/{name}"


def _lost(run: Run, path: str, told: str, artifacts: Artifacts) -> ConfigurationError:
    return ConfigurationError(
        f"{run}: {artifacts.uri(path)} is missing, which says {told}. Nothing was loaded. Restore "
        "it from the backup of the artifacts, then clear this task. Without a backup run the "
        "partition again with the param force=true, which pays for all of it again."
    )
