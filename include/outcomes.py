"""Collects a batch: output and error file of a shard become one outcome per request.

Each line of the shard's index gets exactly one outcome, in index order. Every line of the files
is accounted for: it decides an outcome, is quarantined, is a duplicate, or is blank.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal
from functools import reduce
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from include.answer_reader import answer_reader
from include.answer_schema import Record
from include.artifacts import Artifacts
from include.classification import Problem, Reason, State, classify, clipped
from include.cost import Usage, cost
from include.errors import TransientError
from include.held_answers import HeldAnswers
from include.outcome_columns import (
    CHUNK_ROWS,
    STATE_COLUMNS,
    TOKEN_COLUMNS,
    outcomes_schema,
    state_arrays,
    text_scalar,
)
from include.quarantine import Quarantine
from include.result_file import (
    Answer,
    Damage,
    Quarantined,
    ResultParser,
)
from include.result_lines import Block, Line, read_lines
from include.usual_answer import UsualAnswers
from include.vector_arrays import is_packed

if TYPE_CHECKING:
    from include.job_spec import JobSpec

OUTPUT, ERROR = "output", "error"
SELECTION_COLUMNS = ["_row", "_state", "_change"]
REPEATING_COLUMNS = [*STATE_COLUMNS, *TOKEN_COLUMNS]  # a dictionary makes these small
UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
NOT_USUAL = Problem(Reason.INVALID_ANSWER)  # stands for a line that goes the long way

MISSING_REASONS = {
    "expired": Reason.BATCH_EXPIRED,
    "cancelled": Reason.BATCH_CANCELLED,
    "failed": Reason.BATCH_FAILED,
    "lost": Reason.LOST,
}


@dataclass(frozen=True)
class CollectReport:
    """What a batch came to.

    requests = succeeded + retry + failed; lines = (requests - missing) + quarantined +
    duplicates + blank; foreign lines are among the quarantined ones. Tokens and money count the
    lines that decided an outcome, failed and cut-off ones too: they are billed.
    """

    requests: int
    succeeded: int
    retry: int
    failed: int
    by_reason: Mapping[str, int]
    missing: int
    lines: int
    blank: int
    quarantined: int
    duplicates: int
    foreign: int
    usage: Usage
    untold: int  # answers that do not say what they used
    cost_usd: Decimal | None  # None: the model's price is unknown, or what answers used
    realtime_usd: Decimal | None
    outcomes_file: str
    quarantine_file: str | None  # None: every line was used


def collect_shard(
    spec: JobSpec,
    *,
    index_file: str,
    output_file: str | None,
    error_file: str | None,
    artifacts: Artifacts,
    outcomes_file: str,
    quarantine_file: str,
    batch_status: str | None = None,
    bad_lines: Mapping[int, tuple[str, str]] | None = None,
) -> CollectReport:
    """Write the outcomes of one batch and return its report. Doing it again changes nothing.

    `batch_status` (the batch's final status, or "lost") names the reason of requests without a
    line. `bad_lines` maps line numbers of the request file, from 1, to the code and message with
    which the batch was refused at validation; those requests are failed for good.
    """
    # Arrow's own allocator keeps what it has been given back, which is half as much again.
    pa.set_memory_pool(pa.system_memory_pool())
    with artifacts.open(index_file) as stream:
        index = pq.ParquetFile(stream).read(use_threads=False)
    reason = MISSING_REASONS.get(batch_status or "", Reason.MISSING)
    with ExitStack() as files:
        with Quarantine(artifacts, quarantine_file) as quarantine:
            shard = _Shard(spec, index, quarantine)
            for name, path in ((OUTPUT, output_file), (ERROR, error_file)):
                if path:
                    shard.read(name, _opened(path, artifacts, files))
        missing = shard.fill(reason, bad_lines or {})
        with artifacts.create(outcomes_file) as sink:
            shard.write(sink)
    return _report(spec, shard, missing, (outcomes_file, quarantine.file))


def _opened(path: str, artifacts: Artifacts, files: ExitStack) -> BinaryIO:
    """Open a result file so that its lines can be read again in another order."""
    artifacts.open(path).close()  # says plainly that it is missing
    local = files.enter_context(artifacts.local(path))
    return files.enter_context(local.open("rb"))


def _report(
    spec: JobSpec, shard: _Shard, missing: int, files: tuple[str, str | None]
) -> CollectReport:
    by_reason = Counter(problem.reason for problem in shard.problems.values())
    retry = sum(count for reason, count in by_reason.items() if reason.state is State.RETRY)
    model = spec.request.priced_model
    return CollectReport(
        requests=shard.size,
        succeeded=shard.size - len(shard.problems),
        retry=retry,
        failed=len(shard.problems) - retry,
        by_reason={reason.value: count for reason, count in sorted(by_reason.items())},
        missing=missing,
        lines=shard.lines,
        blank=shard.blank,
        quarantined=shard.quarantine.damaged,
        duplicates=shard.quarantine.duplicates,
        foreign=shard.quarantine.foreign,
        usage=shard.usage,
        untold=shard.untold,
        cost_usd=cost(shard.usage, model, is_told=not shard.untold),
        realtime_usd=cost(shard.usage, model, batch=False, is_told=not shard.untold),
        outcomes_file=files[0],
        quarantine_file=files[1],
    )


class _Shard:
    """The outcomes of one shard, by position in its index."""

    def __init__(self, spec: JobSpec, index: pa.Table, quarantine: Quarantine) -> None:
        self.size = index.num_rows
        self.lines = self.blank = 0
        self.quarantine = quarantine
        self.problems: dict[int, Problem] = {}
        self.usage = Usage()
        self.untold = 0
        self._index = index
        ids = index.column("_custom_id").to_pylist()
        self._positions = {custom_id: position for position, custom_id in enumerate(ids)}
        self._usual = UsualAnswers(spec.request.answer_endpoint)
        self._parser = ResultParser(spec.request.answer_endpoint)
        self._reader = answer_reader(spec.request)
        self._streams: list[BinaryIO] = []
        self._answers = HeldAnswers(self._reader, self._again)
        self._slots = array("q", [-1]) * self.size  # where the answers hold a request's values
        self._problem_lines: dict[int, tuple[str, Line]] = {}

    def read(self, file: str, stream: BinaryIO) -> None:
        """Take in every line of one file, which must stay open until `write` is done."""
        source = read_lines(stream)
        self._streams.append(stream)
        for block in source.blocks():
            self._read_block(file, block)
            self._answers.passed(block.size)
        self.lines += source.lines

    def _read_block(self, file: str, block: Block) -> None:
        """Take in some lines. One that is not the usual answer goes the long way."""
        decode, content_of, trap = self._usual.decode, self._usual.content, self._reader.trap
        find, quick, slots = self._positions.get, self._reader.quick, self._slots
        answers, full = self._answers, self._answers.full
        for at, data in enumerate(block.lines):
            try:
                answer = decode(data)
                body = answer.response.body
                content = content_of(body)
                record = NOT_USUAL if trap in content else quick(content)
            except UNREADABLE:
                self._read_line(file, block, at)
                continue
            position = find(answer.custom_id, -1)
            blank = not content or content.isspace()
            if position < 0 or slots[position] >= 0 or blank or type(record) is Problem:
                self._read_line(file, block, at)
            elif full:
                slots[position] = self._place(block, at, body.usage)
            else:
                slots[position] = answers.add(record, body.usage)

    def _read_line(self, file: str, block: Block, at: int) -> None:
        """Take in one line of any kind."""
        if not block.lines[at] or block.lines[at].isspace():
            self.blank += 1
            return
        line = block.line(at)
        answer = self._parser.parse(line)
        if isinstance(answer, Quarantined):
            self.quarantine.add(file, line, answer.reason, answer.custom_id)
            return
        position = self._positions.get(answer.custom_id)
        if position is None:
            self.quarantine.add(file, line, Damage.FOREIGN, answer.custom_id)
        elif self._slots[position] >= 0 and position not in self.problems:
            self.quarantine.add(file, line, Damage.DUPLICATE, answer.custom_id)
        else:
            self._judge(position, answer, file, (block, at))

    def _judge(
        self, position: int, answer: Answer[Any], file: str, place: tuple[Block, int]
    ) -> None:
        """Keep the first success, or the first line while there is no success."""
        record, line = self._judged(answer), place[0].line(place[1])
        body = answer.response.body if answer.response else None
        usage = body.usage if body else None
        if not isinstance(record, Problem):
            if position in self.problems:
                self._displace(position, answer.custom_id)
            full = self._answers.full
            self._slots[position] = (
                self._place(*place, usage) if full else self._answers.add(record, usage)
            )
        elif position in self.problems:
            self.quarantine.add(file, line, Damage.DUPLICATE, answer.custom_id)
        else:
            self.problems[position] = record
            self._problem_lines[position] = (file, line.without_data())
            self._slots[position] = self._answers.add_nothing(usage)

    def _judged(self, answer: Answer[Any]) -> Record | Problem:
        found = classify(answer)
        return self._reader.read(found) if isinstance(found, str) else found

    def _place(self, block: Block, at: int, usage: Any) -> int:
        file, size = len(self._streams) - 1, len(block.lines[at])
        return self._answers.add_place(file, block.start(at), size, usage)

    def _again(self, file: int, offset: int, size: int) -> Record:
        """Read a line again that has been judged before."""
        data = os.pread(self._streams[file].fileno(), size, offset)
        try:
            content = self._usual.content(self._usual.decode(data).response.body)
            if content and self._reader.trap not in content:
                return self._reader.quick(content)
        except UNREADABLE:
            pass
        answer = self._parser.parse(Line(0, offset, data, size))
        record = NOT_USUAL if isinstance(answer, Quarantined) else self._judged(answer)
        if isinstance(record, Problem):
            raise TransientError("A result file has changed while it was read. Clear the task.")
        return record

    def _displace(self, position: int, custom_id: str) -> None:
        """Forget an error line that a success overrules."""
        del self.problems[position]
        file, line = self._problem_lines.pop(position)
        self.quarantine.add(file, line, Damage.DUPLICATE, custom_id)

    def fill(self, reason: Reason, bad_lines: Mapping[int, tuple[str, str]]) -> int:
        """Give every request without a line its outcome; return how many there are."""
        absent = np.flatnonzero(np.frombuffer(self._slots, dtype=np.int64) < 0).tolist()
        for position in absent:
            bad = bad_lines.get(position + 1)
            self.problems[position] = _refused(*bad) if bad else Problem(reason)
        return len(absent)

    def write(self, sink: BinaryIO) -> None:
        """Write the outcomes in index order."""
        self._positions.clear()  # the ids are needed no longer, and the answers need the memory
        state = pa.table(state_arrays(self.size, self.problems), names=STATE_COLUMNS)
        schema = outcomes_schema(self._index.schema, self._reader.columns)
        slots, start = np.frombuffer(self._slots, dtype=np.int64), 0
        # Long answers are written as they are: to compress them costs more than all the rest.
        compression = dict.fromkeys(schema.names, "none" if self._answers.full else "snappy")
        plain = [field.name for field in schema if not is_packed(field.type)]
        with pq.ParquetWriter(
            sink,
            schema,
            use_dictionary=REPEATING_COLUMNS,
            compression=compression,
            write_statistics=plain,  # extremes of a vector's numbers would tell nobody anything
        ) as writer:
            for answers in self._answers.in_order(slots):
                rows = answers.num_rows
                parts = (self._index.slice(start, rows), state.slice(start, rows), answers)
                columns = [column for part in parts for column in part.columns]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                self.untold += _without_tokens(answers, state.column("_state").slice(start, rows))
                used = (pc.sum(answers.column(name)).as_py() or 0 for name in TOKEN_COLUMNS)
                self.usage += Usage(*used)
                start += rows


def _without_tokens(answers: pa.Table, states: pa.ChunkedArray) -> int:
    """Return how many answers do not say what they used: every one takes some tokens."""
    silent = [pc.equal(answers.column(name), 0) for name in TOKEN_COLUMNS]
    succeeded = pc.equal(states, text_scalar(State.SUCCEEDED))
    return int(pc.sum(reduce(pc.and_, silent, succeeded)).as_py() or 0)


def _refused(code: str, message: str) -> Problem:
    return Problem(Reason.INVALID_REQUEST, clipped(code, 100), clipped(message))


def open_rows(outcome_files: Sequence[str], artifacts: Artifacts) -> Iterator[pa.RecordBatch]:
    """Yield `_row` and `_change` of the rows that go round again, ascending when the files are."""
    retry = text_scalar(State.RETRY)
    for path in outcome_files:
        with artifacts.open(path) as stream:
            batches = pq.ParquetFile(stream).iter_batches(CHUNK_ROWS, columns=SELECTION_COLUMNS)
            for batch in batches:
                found = batch.filter(pc.equal(batch.column("_state"), retry))
                if found.num_rows:
                    yield found.select(["_row", "_change"])
