"""An expert that is down costs no request, and is asked again when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.serve import panel as panel_module
from cluster.serve.panel import Panel
from experts.expert import Encoded

GIVEN = Encoded("one", ("k",), (), 0, 0, 0.0, (0,))


class Call:
    """A call of a handle: awaitable, and it can be cancelled."""

    def __init__(self, outcome: Callable[[], object], log: list[str]) -> None:
        self._outcome, self._log = outcome, log

    def __await__(self):
        return self._run().__await__()

    async def _run(self) -> object:
        made = self._outcome()
        if made == "hang":
            await asyncio.Event().wait()
        if isinstance(made, BaseException):
            raise made
        return made

    def cancel(self) -> None:
        self._log.append("cancelled")


class Handle:
    """A deployment's handle whose expert does what it is told."""

    def __init__(self) -> None:
        self.outcome: object = GIVEN
        self.asked, self.log = 0, list[str]()

    @property
    def encode(self) -> Handle:
        return self

    def remote(self, *arguments: object) -> Call:
        self.asked += 1
        return Call(lambda: self.outcome, self.log)

    @property
    def ready(self) -> Handle:
        return self


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> dict[str, Handle]:
    monkeypatch.setattr(panel_module, "RETRY_S", 0.02)
    monkeypatch.setattr(panel_module, "PROBE_S", 0.1)
    return {"one": Handle(), "two": Handle()}


def failed() -> RayTaskError:
    return RayTaskError("encode", "trace", ValueError("a bad prompt"))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_all_are_asked(handles) -> None:
    seen = asyncio.run(Panel(handles, 1.0).ask("encode", []))
    assert seen.encoded == (GIVEN, GIVEN) and not seen.missing


@pytest.mark.parametrize(
    ("outcome", "reason"), [(ActorDiedError(), "its process is gone"), ("hang", "no answer in time")]
)
def test_who_is_down_is_left_out_at_once_until_it_is_back(handles, outcome, reason) -> None:
    panel = Panel(handles, 0.05)

    async def story() -> None:
        handles["one"].outcome = outcome
        seen = await panel.ask("encode", [])
        assert seen.encoded == (None, GIVEN) and seen.missing == {"one": reason}
        # The call and, of one that has died, its retry: one that is slow gets no more to do.
        assert handles["one"].log.count("cancelled") >= (1 if outcome == "hang" else 2)
        before = handles["two"].asked
        for _ in range(3):
            assert (await panel.ask("encode", [])).missing == {"one": reason}
        assert handles["two"].asked == before + 3
        assert panel.states == {"one": reason, "two": "up"}
        handles["one"].outcome = GIVEN
        await until(lambda: panel.states["one"] == "up")
        assert not (await panel.ask("encode", [])).missing

    asyncio.run(story())


def test_one_that_dies_once_has_a_second_chance(handles) -> None:
    outcomes = iter([ActorDiedError(), GIVEN])
    handles["one"].remote = lambda *arguments: Call(lambda: next(outcomes), handles["one"].log)
    panel = Panel(handles, 1.0)
    assert not asyncio.run(panel.ask("encode", [])).missing and panel.states["one"] == "up"


def test_a_prompt_on_which_an_expert_fails_is_that_prompts_alone(handles) -> None:
    handles["one"].outcome = failed()
    panel = Panel(handles, 1.0)
    seen = asyncio.run(panel.ask("encode", []))
    assert seen.missing == {"one": "failed: a bad prompt"} and panel.states["one"] == "up"
    handles["one"].outcome = GIVEN
    assert not asyncio.run(panel.ask("encode", [])).missing


def test_who_leaves_cancels_the_experts_calls(handles) -> None:
    handles["one"].outcome = handles["two"].outcome = "hang"

    async def leave() -> None:
        asking = asyncio.ensure_future(Panel(handles, 5.0).ask("encode", []))
        await until(lambda: handles["two"].asked == 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    assert handles["one"].log == handles["two"].log == ["cancelled"]
