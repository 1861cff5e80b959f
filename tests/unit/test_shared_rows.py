"""Rows with identical requests: the first is sent, the others end as it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include import shared_rows
from include.arrow_columns import integer_array, text_array
from include.artifacts import Artifacts
from include.shared_rows import Followers, SharedRows

BODIES = st.lists(st.integers(0, 6), min_size=1, max_size=60)


def outcomes(rows: list[int]) -> pa.RecordBatch:
    names = ["id", "_custom_id", "kind", "_row"]
    texts = [[f"{kind}{row}" for row in rows] for kind in ("k", "c", "answer-")]
    columns = [*map(text_array, texts), integer_array(np.array(rows, dtype=np.int64))]
    return pa.RecordBatch.from_arrays(columns, names=names)


def shared_by(folder: Path, bodies: list[int], step: int) -> dict[int, int]:
    """Write the followers of these rows; return the leader of each row."""
    with SharedRows(Artifacts(folder), "shared.parquet") as shared:
        found: list[int] = []
        for start in range(0, len(bodies), step):
            rows = np.arange(start, min(start + step, len(bodies)))
            leaders = shared.leaders([b"%d" % bodies[row] for row in rows], rows)
            follows = (leaders != rows).tolist()
            keys = pa.RecordBatch.from_arrays(
                [text_array([f"k{row}" for row in rows if leaders[row - start] != row])],
                names=["id"],
            )
            ids = [b"%032d" % row for row in rows if leaders[row - start] != row]
            if ids:
                shared.add(keys, ids, leaders[follows])
            found += leaders.tolist()
        shared.finish()
    return dict(enumerate(found))


def read(folder: Path, size: int = 7) -> Iterator[pa.RecordBatch]:
    path = folder / "shared.parquet"
    return pq.ParquetFile(path).iter_batches(size) if path.exists() else iter(())


@settings(max_examples=60, deadline=None)
@given(bodies=BODIES, step=st.integers(1, 20), chunk=st.integers(1, 20))
def test_every_follower_takes_the_outcome_of_its_leader(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[int], step: int, chunk: int
) -> None:
    """Whatever bodies, chunks and buckets are: each row has one outcome, under its own key."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_rows, "LEADERS_PER_BUCKET", 5)
        leaders = shared_by(folder, bodies, step)
    sent = sorted(set(leaders.values()))
    followers = Followers(read(folder), ["id"])

    ended: dict[str, str] = {}
    for start in range(0, len(sent), chunk):
        batch = outcomes(sent[start : start + chunk])
        for part in (batch, *followers.of(batch)):
            assert part.num_rows <= batch.num_rows
            ended |= dict(zip(*(part.column(name).to_pylist() for name in ("id", "kind"))))  # noqa: B905

    assert ended == {f"k{row}": f"answer-{leader}" for row, leader in leaders.items()}
    assert all(bodies[row] == bodies[leader] for row, leader in leaders.items())


def test_followers_of_another_round_are_passed_over(tmp_path: Path) -> None:
    """Leaders that are not among the outcomes have theirs elsewhere."""
    shared_by(tmp_path, [0, 1, 2, 0, 1, 2, 2], 10)

    (copy,) = [part for part in Followers(read(tmp_path), ["id"]).of(outcomes([1])) if part]

    assert copy.column("id").to_pylist() == ["k4"]
    assert copy.column("_custom_id").to_pylist() == [f"{4:032d}"]


def test_the_memory_is_bounded(tmp_path: Path) -> None:
    """Bodies beyond those that are remembered are sent for themselves."""
    with SharedRows(Artifacts(tmp_path), "shared.parquet", most=2) as shared:
        leaders = shared.leaders([b"a", b"b", b"c", b"c", b"a"], np.arange(5))

    assert leaders.tolist() == [0, 1, 2, 3, 0]


def test_without_followers_there_is_no_file(tmp_path: Path) -> None:
    """A run whose rows all differ leaves nothing behind."""
    shared_by(tmp_path, [1, 2, 3], 2)

    assert not (tmp_path / "shared.parquet").exists()
