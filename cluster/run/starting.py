"""Where a fresh run's router starts: from a saved one, from a look at the experts' states, from their words."""

from __future__ import annotations

import time

from rich.console import Console

from cluster.config import RunConfig
from cluster.run.asked import answer_tokens
from cluster.run.fleet import Reference
from cluster.run.models import model_path
from cluster.run.start import Started
from cluster.run.trained import router_folder, saved_experts
from experts.chat import Chat
from experts.expert import Encoded, whole
from experts.joining import with_newcomers
from experts.loading import load_tokenizer
from experts.state import Arrays, fitted, load_router
from learner.fresh import Fresh
from rewards.stream import PromptStream
from rollout.text import cut, in_front


async def start_router(config: RunConfig, started: Started, stream: PromptStream, console: Console) -> dict[str, float]:
    """Gives every rank the weights that training starts from; returns what finding them cost, as metrics name it."""
    fleet, router, begun = started.fleet, config.router, time.perf_counter()
    steps: list[Fresh] = []
    if router.init:
        steps.append(await _saved(config, started, stream, console))
    else:
        if router.calibration.prompts and fleet.asked.what == "states":
            with console.status("looking at the experts' states"):
                steps.append(await _calibrated(config, started, stream))
        if router.warm_start.steps and router.kind not in ("none", "text"):
            with console.status(f"letting the experts answer {router.warm_start.prompts:,} prompts, once"):
                steps += await _warm(config, started, stream, steps[-1].arrays if steps else None)
            console.print(
                f"warm start: the prefix is off the experts' words by {steps[-1].after:.1%} of their size (mean "
                f"square, held out), {steps[-1].before:.0%} before",
                highlight=False,
            )
    if steps:
        start_from = [rank.call("start_from", steps[-1].arrays) for rank in fleet.learners]
        await fleet.get_all(start_from, "starting the router")
    return {
        "time/start_s": time.perf_counter() - begun,
        "operations/experts": sum(step.experts for step in steps),
        "operations/experts_cold": sum(step.experts_cold for step in steps),
        "operations/learner": sum(step.learner for step in steps),
    }


async def _saved(config: RunConfig, started: Started, stream: PromptStream, console: Console) -> Fresh:
    """The weights of `router.init`, with those of new experts beside them."""
    fleet, router, shape = started.fleet, config.router, started.shape
    assert router.init is not None
    folder = router_folder(router.init)
    fresh = (await fleet.get(fleet.learners[0].call("snapshot"), "the router")).arrays
    if not router.add_expert:
        return Fresh(fitted(load_router(folder, shape, router).arrays, fresh, router.init))
    names = saved_experts(folder)
    saved = load_router(folder, shape.of(names), router)
    places = [shape.experts.index(name) for name in names]
    new = [shape.experts.index(name) for name in router.add_expert]
    arrays = with_newcomers(saved.arrays, fresh, places, new, router.init)
    with console.status(f"looking at the states of {', '.join(router.add_expert)}"):
        made: Fresh = await fleet.get(
            fleet.learners[0].call("add_experts", arrays, *_encoded(config, started, stream)), "joining"
        )
    return made


def _encoded(config: RunConfig, started: Started, stream: PromptStream) -> list[Reference]:
    """The experts' states on the prompts that projections are calibrated with."""
    prompts = [stream.prompt(ordinal) for ordinal in range(config.router.calibration.prompts)]
    return [stage.reference for stage in started.fleet.encode(prompts)]


async def _calibrated(config: RunConfig, started: Started, stream: PromptStream) -> Fresh:
    fleet = started.fleet
    encoded = _encoded(config, started, stream)
    made: Fresh = await fleet.get(fleet.learners[0].call("calibrate", *encoded), "calibrating")
    return made


async def _warm(
    config: RunConfig, started: Started, stream: PromptStream, arrays: Arrays | None
) -> tuple[Fresh, Fresh]:
    """The experts' words, and the router that they made."""
    fleet, learner = started.fleet, started.fleet.learners[0]
    prompts = [stream.prompt(ordinal) for ordinal in range(config.router.warm_start.prompts)]
    await fleet.prepare(answers=True)
    stages = fleet.answers(prompts, answer_tokens(config))
    limit = fleet.start_deadline_s
    asked = [stage.reference for stage in stages]
    said: list[Encoded] = whole(await fleet.get_all(asked, "the experts' words", limit, stages))
    await fleet.prepare(answers=False)
    template = config.router.text.template
    chat, most = Chat(load_tokenizer(model_path(config.policy.model))), answer_tokens(config)
    heard = [{each.expert: cut(each.answers[row], chat, most) for each in said} for row in range(len(prompts))]
    texts = [in_front(template, mine) for mine in heard]
    if arrays is None:
        arrays = (await fleet.get(learner.call("snapshot"), "the router")).arrays
    encoded = [stage.reference for stage in fleet.encode(prompts)]
    made: Fresh = await fleet.get(learner.call("warm_start", arrays, texts, *encoded), "the router's warm start", limit)
    return Fresh(arrays, sum(e.operations for e in said), sum(e.cold for e in said)), made
