"""A tier's state machine, whatever its children do and in whatever order."""

from contextlib import suppress
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent.core.errors import ActionError
from agent.gator.spec import Group, Job, Node
from agent.gator.summary import Sums, job_summary
from agent.gator.tree import Act, Again, Ended, Times, Tree

NAMES = "abcdef"


@st.composite
def groups(draw: st.DrawFn) -> Group:
    jobs: list[Node] = []
    for name in NAMES[: draw(st.integers(0, 6))]:
        before = (
            st.lists(st.sampled_from([job.ident for job in jobs]), max_size=2, unique=True) if jobs else st.just([])
        )
        needs: dict[str, Any] = {key: tuple(draw(before)) for key in ("on_pass", "on_fail", "on_done")}
        if draw(st.booleans()):
            jobs.append(Job(ident=name, command="x", retries=draw(st.integers(0, 2)), **needs))
        else:
            inner = (Job(ident="x", command="x"),) * draw(st.integers(0, 1))
            jobs.append(Group(ident=name, jobs=inner, **needs))
    return Group(ident="g", jobs=tuple(jobs), repeats=draw(st.none() | st.integers(0, 3)))


class TreeOfJobs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ended: list[str] = []

    @initialize(group=groups(), retry_on=st.sets(st.sampled_from(["lost", "timeout", "fail"])))
    def start(self, group: Group, retry_on: set[str]) -> None:
        self.tree = Tree(group, Times(), retry_on=tuple(retry_on))  # type: ignore[arg-type]  # literals
        self.take(self.tree.start(0))

    def take(self, acts: list[Act]) -> None:
        self.ended += [act.ident for act in acts if isinstance(act, Ended)]
        for act in acts:
            if isinstance(act, Again):
                assert self.tree.kids[act.ident].state == "PENDING"

    def any_of(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from([*self.tree.kids, "nobody"]))

    @rule(data=st.data(), is_local=st.booleans())
    def launch(self, data: st.DataObject, is_local: bool) -> None:
        queues = [queue for _, queue in self.tree.ready()]
        if queues:
            self.tree.launched(data.draw(st.sampled_from(queues)).popleft(), self.now, is_local=is_local)

    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        with suppress(ActionError):
            self.tree.register(self.any_of(data), "h:1", self.now, self.now)

    @rule(data=st.data(), passed=st.none() | st.booleans())
    def update(self, data: st.DataObject, passed: bool | None) -> None:
        ident = self.any_of(data)
        with suppress(ActionError):
            self.tree.update(ident, job_summary(ident, {"lint": 1}, passed=passed), self.now, self.now)

    @rule(data=st.data(), passed=st.booleans(), code=st.sampled_from([0, 1, 124]))
    def complete(self, data: st.DataObject, passed: bool, code: int) -> None:
        ident = self.any_of(data)
        summary = job_summary(ident, {"lint": 2}, passed=passed)
        with suppress(ActionError):
            result = "SUCCESS" if passed else "FAILURE"
            self.take(self.tree.complete(ident, result, code, summary, self.now, self.now))  # type: ignore[arg-type]

    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        if self.tree.live:
            ident = data.draw(st.sampled_from(list(self.tree.live)))
            data.draw(st.sampled_from([self.tree.gone, self.tree.process_ended, self.tree.waits_in_queue]))(
                ident, self.now
            )

    @rule(later=st.sampled_from([0.5, 3.0, 31.0, 601.0]))
    def wait(self, later: float) -> None:
        self.now += later
        self.take(self.tree.overdue(self.now, self.now))

    @rule()
    def stop(self) -> None:
        self.take(self.tree.stop(self.now))

    @invariant()
    def each_child_ends_once_and_the_sums_are_those_of_the_children(self) -> None:
        if not hasattr(self, "tree"):
            return
        complete = [ident for ident, kid in self.tree.kids.items() if kid.state == "COMPLETE"]
        assert sorted(self.ended) == sorted(complete)
        assert self.tree.is_done == (len(complete) == len(self.tree.kids))
        assert set(self.tree.live) == {i for i, kid in self.tree.kids.items() if kid.state in ("LAUNCHED", "STARTED")}
        counted = [self.tree.total.get(i) for i, kid in self.tree.kids.items() if kid.result != "ABORTED"]
        assert self.tree.total.jobs == sum((summary.jobs for summary in counted), Sums())
        assert self.tree.total.metrics.get("lint", 0) == sum(summary.metrics.get("lint", 0) for summary in counted)

    def teardown(self) -> None:  # type: ignore[explicit-override]  # typing.override needs Python 3.12
        """Nobody is forgotten: when all that lives is lost and all that waits is stopped, it is done."""
        if hasattr(self, "tree"):
            self.take(self.tree.stop(self.now))
            for ident in list(self.tree.live):
                self.take(self.tree.lose(ident, "over", self.now))
            assert self.tree.is_done


TestTreeOfJobs = TreeOfJobs.TestCase
TestTreeOfJobs.settings = settings(max_examples=40)
