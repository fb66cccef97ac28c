"""The wire vocabulary of Polarize, of Polarion's xUnit importer and of the CI Bus.

Source: protocols/emissary.md, "Polarize", "CI Bus".
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

JobId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # what every reader of JSON has exactly


class TestRun(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Which test run the results go to."""

    id: str
    title: str
    template_id: str
    testrun_type: str


class SuiteFlags(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """How the importer treats the document."""

    dry_run: bool
    set_testrun_finished: bool
    include_skipped: bool


class Custom(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Flags, and the test run's custom fields."""

    test_suite: SuiteFlags
    properties: dict[str, str]


class Selector(msgspec.Struct, frozen=True):
    """Marks the message that the importer sends on the CI Bus when it is done."""

    name: str
    value: str


class XunitArgs(msgspec.Struct, frozen=True, kw_only=True):
    """The part `xunit` of the arguments. `timeout` is milliseconds, as Polarize has it."""

    testrun: TestRun
    custom: Custom
    selector: Selector
    timeout: int = 300_000
    enabled: bool = True


class Server(msgspec.Struct, frozen=True):
    """Credentials that Polarize uses towards Polarion."""

    user: str
    password: str


class Xargs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The arguments beside the xUnit document. `servers` is there only when credentials are set."""

    project: str
    xunit: XunitArgs
    servers: dict[str, Server] = {}


class ImportReply(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """What Polarize says of an import: `status` decides."""

    status: str
    result: Any = None
    errors: Any = None
    new_xunit_path: str | None = None


class WsFrame(msgspec.Struct, frozen=True, kw_only=True):
    """A frame of Polarize's websocket. `data` is JSON text, or an object where `polarize.ws_data` says so."""

    op: str
    type: str
    tag: str
    ack: bool
    data: Any


class WsData(msgspec.Struct, frozen=True):
    """What `data` holds: the document and the arguments, each as text."""

    xunit: str
    xargs: str


class FileReply(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """What Polarion's importer says of one file. `[0]` or null: it was not queued."""

    job_ids: list[JobId] | None = None
    error_message: str | None = None


class ImportAccepted(msgspec.Struct, frozen=True):
    """Polarion's reply to an upload, by file name."""

    files: dict[str, FileReply]


class Job(msgspec.Struct, frozen=True):
    """A job of Polarion's queue: READY, RUNNING, SUCCESS (any case), else failed."""

    id: JobId
    status: str


class Queue(msgspec.Struct, frozen=True):
    """Polarion's queue as asked for; a job that it does not list has not ended."""

    jobs: list[Job]


class SuiteResult(msgspec.Struct, frozen=True, rename="kebab"):
    """One suite in a completion message."""

    suite_name: str
    status: str


class Completion(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """The body of a CI Bus message: the import is over. With `message` instead of results it failed."""

    testrun_url: str | None = None
    import_results: list[SuiteResult] | None = None
    status: Literal["passed", "partial", "failed"] | None = None
    log_url: str | None = None
    message: str | None = None
