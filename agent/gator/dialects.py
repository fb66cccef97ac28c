"""Dialects of Gator told apart, and their payloads turned into what we hold and back. Pure.

    spec, register   `id` without `ident`  -> D0
    first update     `summary`             -> D2, else D1
    register answer  `emissary` -> ours;  `uidx` -> D2;  else D1, or D0 when the spec says `id:`

Source: protocols/gator.md, "Dialects", "Decisions"; seeds/gator-websocket-api.md.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

import agent
from agent.core.errors import ActionError
from agent.gator.messages import (
    MAX_METRICS,
    MAX_PATH_TEXT,
    MAX_PATHS,
    MAX_VALUE,
    RESERVED,
    RESULTS,
    STATES,
    ApiJob,
    ChildState,
    Complete,
    Dialect,
    Named,
    Number,
    Path,
    Report,
    Report2,
    Result,
)
from agent.gator.spec import Size
from agent.gator.summary import Summary, Sums

_SUBS = ("sub_total", "sub_active", "sub_passed", "sub_failed")


def wrong(reason: str) -> ActionError:
    """An error answer as Gator gives them: a sentence without a code."""
    return ActionError("", reason)


def read(action: str, payload: Mapping[str, Any], kind: type[Any]) -> Any:
    """A payload as the struct of its action. Raises ActionError with what is missing or wrong."""
    try:
        return msgspec.convert(payload, kind)
    except msgspec.ValidationError as err:
        raise wrong(f"{action}: {err}") from err


# ---- a child's requests, at a tier ----------------------------------------------------------------------------------


def named(action: str, payload: Mapping[str, Any]) -> tuple[str, bool]:
    """Whom a request of a child is about, and whether it said so as D0 does. Raises ActionError."""
    given: Named = read(action, payload, Named)
    ident = given.ident if given.ident is not None else given.id
    if ident is None:
        raise wrong(f"{action}: Object missing required field `ident`")
    return ident, given.ident is None


def child_dialect(named_as_d0: bool, payload: Mapping[str, Any]) -> Dialect:
    """The dialect of a child, by its update or complete."""
    if "summary" in payload:
        return "d2"
    return "d0" if named_as_d0 else "d1"


def register_answer(path: Sequence[str], uidx: int) -> dict[str, Any]:
    """What a tier answers to every child; those of D0 and D1 take more than their own {}."""
    return {
        "path": list(path),
        "root": 0,
        "uidx": uidx,
        "emissary": {"version": agent.__version__, "resume": True},
    }


def read_update(payload: Mapping[str, Any], size: Size) -> tuple[Summary, Result]:
    """An `update` in any dialect; `size` is what the spec says of that child. Raises ActionError."""
    if "summary" in payload:
        report: Report2 = read("update", payload, Report2)
        return _summary2("update", report, size), RESULTS[report.result]
    return _summary1("update", payload, size), "UNKNOWN"


def read_complete(ident: str, payload: Mapping[str, Any], size: Size) -> tuple[Summary, Result, int]:
    """A `complete` in any dialect: summary, result, code. Raises ActionError, also while jobs are active."""
    if "summary" in payload:
        report: Report2 = read("complete", payload, Report2)
        if "result" not in payload or "code" not in payload:
            raise wrong("complete: Object missing required field `result` or `code`")
        summary, result, code = _summary2("complete", report, size), RESULTS[report.result], report.code
        both, is_exact = summary.jobs + summary.tiers, report.emissary.jobs is not None
    else:
        given: Complete = read("complete", payload, Complete)
        name = given.result.strip().upper()
        known = next((result for result in RESULTS if result == name), None)
        if known is None:
            raise wrong(f"complete: {given.result!r} is not a valid result; SUCCESS or FAILURE is")
        summary, result, code = _summary1("complete", payload, size), known, given.code
        both, is_exact = None, False
    if result == "UNKNOWN":  # who has ended has passed or failed: what depends on it asks for one of these
        result = "FAILURE"
    if active := (both or summary.jobs).active:
        raise wrong(f"complete: {active} jobs are still active (sub_active)")
    if not is_exact:
        summary, result = _settled(ident, summary, both, result, size)
    return summary, result, code


def _settled(ident: str, told: Summary, both: Sums | None, result: Result, size: Size) -> tuple[Summary, Result]:
    """What a foreign child has come to. A job passed or failed as its result says.

    A tier has failed with any of its jobs, whatever it says (those of D0 do not). What was pruned is in the total that
    it tells, not in what passed or failed. `both` are its sums of jobs and tiers together, where it is of D2.
    """
    if not size.tiers:
        has_passed = result == "SUCCESS"
        jobs = Sums(1, 0, int(has_passed), int(not has_passed))
        return Summary(jobs=jobs, metrics=told.metrics, failed=() if has_passed else ((ident,),)), result
    if told.jobs.failed and result == "SUCCESS":
        result = "FAILURE"
    failed_jobs, passed_jobs = told.jobs.failed, told.jobs.passed
    failed_tiers = int(result != "SUCCESS")
    if both is not None:
        failed_tiers = max(failed_tiers, both.failed - failed_jobs)
        passed_jobs = max(both.passed - max(size.tiers - failed_tiers, 0), 0)
    tiers = Sums(size.tiers, 0, max(size.tiers - failed_tiers, 0), failed_tiers)
    failed = told.failed or (((ident,),) if failed_tiers else ())
    jobs = Sums(passed_jobs + failed_jobs, 0, passed_jobs, failed_jobs)
    return Summary(jobs=jobs, tiers=tiers, metrics=told.metrics, failed=failed), result


def _summary1(action: str, payload: Mapping[str, Any], size: Size) -> Summary:
    report: Report = read(action, payload, Report)
    metrics = report.metrics
    within = _sums(action, metrics, size.jobs)
    beside = {name: each for name in _SUBS if (each := getattr(report, name)) is not None}
    jobs = Sums(**{name.removeprefix("sub_"): beside.get(name, within[name]) for name in _SUBS})
    return Summary(jobs=jobs, tiers=_tiers(size, jobs), metrics=_own(metrics), failed=_paths(report.failed_ids))


def _sums(action: str, metrics: Mapping[str, Number], total: int) -> dict[str, int]:
    """The `sub_*` among metrics; `total` where none is told. Raises ActionError."""
    for name in _SUBS:
        told = metrics.get(name, 0)
        if told < 0 or told != told // 1:
            raise wrong(f"{action}: {name} is {told!r}, which is no number of jobs")
    return {name: int(metrics.get(name, total if name == "sub_total" else 0)) for name in _SUBS}


def _tiers(size: Size, jobs: Sums) -> Sums:
    """The tiers of a child that counts jobs only: they are done when all of its jobs are."""
    if not size.tiers:
        return Sums()
    is_done, failed = not jobs.active and jobs.passed + jobs.failed >= jobs.total, int(jobs.failed > 0)
    return Sums(size.tiers, int(not is_done), size.tiers - failed if is_done else 0, failed)


def _summary2(action: str, report: Report2, size: Size) -> Summary:
    """Of jobs and tiers together; apart by what ours tell, else by what the spec says and the lists of paths."""
    metrics = report.summary.metrics
    both = Sums(*_sums(action, metrics, 0).values())
    failed, running = _paths(report.summary.failed_ids), _paths(report.summary.running_ids)
    if report.emissary.jobs is not None:
        jobs = Sums(*report.emissary.jobs)
    elif not size.tiers:
        jobs = both
    else:
        lost = min(len(failed), both.failed, size.jobs)
        active = min(len(running), both.active, size.jobs - lost)
        passed = min(max(size.jobs - lost - active, 0), both.passed)
        if active or both.active:
            passed = min(passed, max(both.passed - size.tiers + 1, 0))
        jobs = Sums(min(size.jobs, both.total), active, passed, lost)
    return Summary(jobs=jobs, tiers=both - jobs, metrics=_own(metrics), failed=failed, running=running)


def _own(metrics: Mapping[str, Number]) -> dict[str, Number]:
    kept = (item for item in metrics.items() if not item[0].startswith("sub_"))
    return {name: value for name, value in kept if -MAX_VALUE <= value <= MAX_VALUE}


def _paths(lists: Iterable[Sequence[str]]) -> tuple[Path, ...]:
    return tuple(map(tuple, lists))[:MAX_PATHS]


# ---- our reports to a parent ----------------------------------------------------------------------------------------


def parent_dialect(answer: Mapping[str, Any], *, spec_says_id: bool) -> Dialect:
    """The dialect of a parent, by its answer to `register`."""
    if isinstance(answer.get("emissary"), dict):
        return "emissary"
    if "uidx" in answer:
        return "d2"
    return "d0" if spec_says_id else "d1"


def is_plain_dialect(dialect: Dialect, server: str) -> bool:
    """Does this parent die of a metric that it does not have itself? `server` is the header of its 101 answer."""
    return dialect == "d0" or (dialect == "d1" and "websockets/11." in server)


def report(dialect: Dialect, ident: str, summary: Summary, result: Result, *, plain: bool) -> dict[str, Any]:
    """The payload of an `update`. `plain`: only what a real tier of D0 or D1 takes."""
    if dialect in ("d2", "emissary"):
        told = {"ident": ident, "id": ident, "summary": written_d2(summary), "result": RESULTS.index(result)}
        return told if dialect == "d2" else {**told, "emissary": {"jobs": msgspec.structs.astuple(summary.jobs)}}
    counts = _counts(summary.jobs)
    metrics = _told_metrics(summary)
    if plain:
        metrics = {name: value for name, value in metrics.items() if name.startswith("msg_")}
    else:
        metrics.update(counts)
    return {"ident": ident, "id": ident, "metrics": metrics, **counts, "failed_ids": _told_paths(summary.failed)}


def completion(
    dialect: Dialect, ident: str, summary: Summary, result: Result, code: int, *, plain: bool
) -> dict[str, Any]:
    """The payload of a `complete`."""
    payload = report(dialect, ident, summary, result, plain=plain)
    if dialect in ("d2", "emissary"):
        return {**payload, "code": code}
    payload.pop("sub_active")
    return {**payload, "result": "SUCCESS" if result == "SUCCESS" else "FAILURE", "code": code}


def written_d2(summary: Summary) -> dict[str, Any]:
    """A summary as D2 tells it: metrics with the sums of jobs and tiers, paths of those that failed and run."""
    return {
        "metrics": {**_told_metrics(summary), **_counts(summary.jobs + summary.tiers)},
        "failed_ids": _told_paths(summary.failed),
        "running_ids": _told_paths(summary.running),
    }


def _told_metrics(summary: Summary) -> dict[str, Number]:
    return dict(islice(summary.metrics.items(), MAX_METRICS))  # those of messages come first (layer.no_messages)


def _told_paths(paths: Sequence[Path]) -> list[list[str]]:
    told, size = list[list[str]](), 0
    for path in paths[:MAX_PATHS]:
        size += sum(map(len, path))
        if size > MAX_PATH_TEXT:
            break
        told.append(list(path))
    return told


def _counts(sums: Sums) -> dict[str, int]:
    return dict(zip(_SUBS, msgspec.structs.astuple(sums), strict=True))


def is_reserved(name: str) -> bool:
    """Is that metric counted by the layers themselves?"""
    return name.startswith(RESERVED)


# ---- children, as told by a tier ------------------------------------------------------------------------------------


def read_children(payload: Mapping[str, Any]) -> dict[str, ChildState]:
    """An answer to `children` in any of its shapes: flat (the seed), by state (real D0, D1), ApiJobs (D2).

    Raises ActionError.
    """
    if isinstance(payload.get("children"), list):
        jobs: list[ApiJob] = read("children", {"of": payload["children"]}, _Jobs).of
        return {job.ident: _child(job) for job in jobs}
    if payload.keys() <= {"launched", "pending", "completed"} and all(
        isinstance(value, dict) and "state" not in value for value in payload.values()
    ):
        payload = {name: child for part in payload.values() for name, child in part.items()}
    children: dict[str, ChildState] = read("children", {"of": payload}, _Flat).of
    return children


class _Jobs(msgspec.Struct):
    of: list[ApiJob]


class _Flat(msgspec.Struct):
    of: dict[str, ChildState]


def _child(job: ApiJob) -> ChildState:
    return ChildState(
        state=STATES[min(max(job.status, 0), 3)],
        result=RESULTS[min(max(job.result, 0), 3)],
        server=job.server_url,
        metrics=job.metrics,
        exitcode=0,
        started=int(job.started or 0),
        updated=int(job.updated or 0),
        completed=int(job.stopped or 0),
    )
