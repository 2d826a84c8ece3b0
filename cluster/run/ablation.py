"""What a trained router loses without an expert, with other states of it, or with a prefix that is always the same.

Attention shows where a router looks; only an intervention shows what it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from cluster.run.evaluate import Answered, Evaluator, donors_of
from cluster.run.fleet import Fleet, Reference, Stage
from cluster.watch.ablation import FROZEN, KNOCKED_OUT, MEAN_STATES, SHUFFLED, STOOD_IN, Ablated, Ablation
from experts.expert import Encoded, whole
from experts.standins import States
from rollout.types import Prompt

NO_SLOTS = np.zeros((0, 1), np.float32)


class Intervention:
    """Answers of one router to some prompts under every intervention.

    prompts: grouped by task, as `Evaluator.prompts` gives them.
    stand_ins: for experts that are away, by name.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        fleet: Fleet,
        prompts: Sequence[Prompt],
        router: Reference,
        stand_ins: States = MappingProxyType({}),
    ) -> None:
        self.evaluator, self.fleet, self.prompts, self.router = evaluator, fleet, list(prompts), router
        self.stand_ins = stand_ins
        self.places = {id(prompt): place for place, prompt in enumerate(self.prompts)}
        self.encoded: list[Encoded] = []

    async def measured(self) -> Ablation:
        """All of it."""
        stages = self.fleet.encode(self.prompts)
        asked = [stage.reference for stage in stages]
        self.encoded = whole(await self.fleet.get_all(asked, "encoding for the ablation", stages=stages))
        experts = self.evaluator.experts
        full = await self._answered(self.encoded)
        attention = [group.attention for report in full.reports for group in report.groups]
        found = []
        for place, expert in enumerate(experts):
            # Where there is one expert only, nothing is left to make a prefix from.
            without: dict[str, Any] = {"hidden": (place,)} if len(experts) > 1 else {"prefix": NO_SLOTS}
            found.append(Ablated(KNOCKED_OUT, expert, (await self._answered(self.encoded, **without)).outcomes))
            if expert in self.stand_ins:
                stood_in = await self._answered(self.encoded, stand_ins={place: self.stand_ins[expert]})
                found.append(Ablated(STOOD_IN, expert, stood_in.outcomes))
            found += [
                Ablated(SHUFFLED, expert, (await self._answered(self._shuffled(place))).outcomes),
                Ablated(MEAN_STATES, expert, (await self._answered(self._averaged(place))).outcomes),
            ]
        found.append(Ablated(FROZEN, None, await self._frozen()))
        tasks = [prompt.task for prompt in self.prompts]
        return Ablation(tuple(experts), tuple(tasks), full.outcomes, np.array(attention), tuple(found))

    async def _answered(
        self, encoded: Sequence[Encoded], prompts: Sequence[Prompt] | None = None, **how: Any
    ) -> Answered:
        def ask(chunk: Sequence[Prompt]) -> list[Stage]:
            rows = [self.places[id(prompt)] for prompt in chunk]
            return [
                Stage.of(handle, _rows(each, rows))
                for handle, each in zip([copies.handles[0] for copies in self.fleet.copies], encoded, strict=True)
            ]

        return await self.evaluator.answered(prompts or self.prompts, self.router, ask, **how)

    def _shuffled(self, place: int) -> list[Encoded]:
        """One expert's states come from another prompt of the task with another answer."""
        donors = donors_of(self.prompts, within_task=True, seed=self.evaluator.config.evaluation.seed)
        rows = [self.places[id(donor)] for donor in donors]
        return [_rows(each, rows) if i == place else each for i, each in enumerate(self.encoded)]

    def _averaged(self, place: int) -> list[Encoded]:
        """One expert's states are their mean over all prompts; of several tokens each, token by token from the end."""
        states = self.encoded[place].features
        longest = max(len(state) for state in states)
        sums, counts = np.zeros((longest, states[0].shape[1]), np.float32), np.zeros((longest, 1), np.float32)
        for state in states:
            sums[longest - len(state) :] += state
            counts[longest - len(state) :] += 1
        mean = sums / counts
        same = tuple(mean[longest - len(state) :] for state in states)
        return [replace(each, features=same) if i == place else each for i, each in enumerate(self.encoded)]

    async def _frozen(self) -> list[int]:
        """Every prompt gets the mean prefix of its task."""
        outcomes: list[int] = []
        for task in dict.fromkeys(prompt.task for prompt in self.prompts):
            mine = [prompt for prompt in self.prompts if prompt.task == task]
            encoded = [_rows(each, [self.places[id(prompt)] for prompt in mine]) for each in self.encoded]
            made = self.fleet.rollouts[0].call("mean_prefix", mine, self.router, *encoded)
            prefix = await self.fleet.get(made, "the mean prefix")
            outcomes += (await self._answered(self.encoded, mine, prefix=prefix)).outcomes
        return outcomes


def _rows(encoded: Encoded, rows: Sequence[int]) -> Encoded:
    """Some prompts' part, in this order."""
    return replace(
        encoded,
        keys=tuple(encoded.keys[row] for row in rows),
        features=tuple(encoded.features[row] for row in rows),
        rows=tuple(range(len(rows))),
    )
