"""What a run came to: its records folded into counts and a verdict, and the result document. Pure.

The records are never held: they are read from the journal once for each pass, and of each only a number is kept.

Source: protocols/suites.md, "States", "Records, events, result".
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal, get_args

import msgspec

from agent.core.events import Counts, State, SuiteFinished, TestFinished, Verdict, of_all_attempts
from agent.suites.messages import ResultDocument, ResultRecord

_STATES: Final[tuple[State, ...]] = get_args(State)
_KINDS: Final = ("test", "rest", "hook", "crash")
_COUNTED: Final = ("test", "rest")
_WORST: Final[tuple[Verdict, ...]] = ("lost", "aborted", "failed", "blocked")
_REV_MAX: Final = 0xFFFF
_FIELDS: Final = ResultDocument.__struct_fields__
_TESTS: Final = _FIELDS.index("tests")


class Tally:
    """Folds records. A correction (same case, higher rev) replaces a record, a later attempt the earlier one.

    Crashes and failed hooks weigh in the verdict, and are not among the counts. A `rest` counts as many tests as it
    stands for, and as one where their number is unknown.
    """

    def __init__(self, min_tests: int) -> None:
        self._min_tests = min_tests
        self._seen: dict[str, int] = {}  # case -> attempt, rev, kind and state of the record that holds
        self._codes: dict[int, int] = {}  # each once: there are few, and a case keeps one
        self._attempts: dict[str, int] = {}  # test -> its last attempt, where that is not the first
        self._rests: dict[str, int] = {}  # case -> how many tests, where known

    def add(self, record: TestFinished) -> None:
        """Take a record, in any order."""
        code = _code(record)
        if code >> 8 < self._seen.get(record.case, 0) >> 8:
            return
        self._seen[record.case] = self._codes.setdefault(code, code)
        if record.attempt > 1:
            test = of_all_attempts(record.case, record.attempt)
            self._attempts[test] = max(record.attempt, self._attempts.get(test, 0))
        if record.kind == "rest" and record.count is not None:
            self._rests[record.case] = record.count

    def counts(self) -> Counts:
        """Tests by state, over the kinds `test` and `rest`."""
        found = dict.fromkeys(_STATES, 0)
        for case, code in self._last():
            if _KINDS[code >> 4 & 0xF] in _COUNTED:
                found[_STATES[code & 0xF]] += self._rests.get(case, 1)
        return Counts(total=sum(found.values()), **found)

    def verdict(self) -> Verdict:
        """The first present of lost, aborted, failed, blocked.

        Else passed, if enough tests have; else skipped, if anything was skipped or todo; else blocked.
        """
        present = {_STATES[code & 0xF] for _, code in self._last()}
        for state in _WORST:
            if state in present:
                return state
        if self.counts().passed >= self._min_tests:
            return "passed"
        return "skipped" if present & {"skipped", "todo"} else "blocked"

    def finish(self, finished: SuiteFinished) -> SuiteFinished:
        """The event with the verdict, the result for the Seneschal and the counts filled in."""
        verdict = self.verdict()
        result: Literal["SUCCESS", "FAILURE", "ABORTED"] = "FAILURE"
        if verdict == "passed":
            result = "SUCCESS"
        elif verdict == "aborted":
            result = "ABORTED"
        return msgspec.structs.replace(finished, verdict=verdict, result=result, counts=self.counts())

    def newest(self, records: Iterable[TestFinished]) -> Iterator[TestFinished]:
        """Those of the same records that no correction replaced, of all attempts: for the result document."""
        for record in records:
            if self._seen.get(record.case, 0) >> 8 == _code(record) >> 8:
                yield record

    def last(self, records: Iterable[TestFinished]) -> Iterator[TestFinished]:
        """Those of the same records that count, of the last attempts only: for the xUnit document."""
        return (record for record in self.newest(records) if self._is_last(record.case, record.attempt))

    def _last(self) -> Iterator[tuple[str, int]]:
        return ((case, code) for case, code in self._seen.items() if self._is_last(case, code >> 24))

    def _is_last(self, case: str, attempt: int) -> bool:
        return self._attempts.get(of_all_attempts(case, attempt), attempt) == attempt


def document(finished: SuiteFinished, records: Iterable[TestFinished]) -> Iterator[bytes]:
    """The result document, one JSON object on one line, in parts. `records` are those that hold, see Tally."""
    yield b"{%b" % b"".join(b"%b:%b," % _field(name, finished) for name in _FIELDS[:_TESTS])
    yield b'"tests":['
    comma = b""
    for record in records:
        yield comma + _json(_shown(record))
        comma = b","
    yield b"]%b}\n" % b"".join(b",%b:%b" % _field(name, finished) for name in _FIELDS[_TESTS + 1 :])


def _field(name: str, finished: SuiteFinished) -> tuple[bytes, bytes]:
    return _json(name), _json(getattr(finished, name))


def _shown(record: TestFinished) -> ResultRecord:
    return ResultRecord(
        case=record.case,
        name=record.name,
        file=record.file,
        kind=record.kind,
        state=record.state,
        started=record.started,
        ended=record.ended,
        duration=record.duration,
        attempt=record.attempt,
        message=record.message,
        details=record.details,
        at=record.at,
        log=record.log,
        output=record.output,
        known_failure=record.known_failure,
        rev=record.rev,
        count=record.count if record.kind == "rest" else msgspec.UNSET,
    )


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value)


def _code(record: TestFinished) -> int:
    rev = min(record.rev, _REV_MAX)
    return record.attempt << 24 | rev << 8 | _KINDS.index(record.kind) << 4 | _STATES.index(record.state)
