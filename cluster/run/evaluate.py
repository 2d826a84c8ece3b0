"""Held-out accuracy of the router, its controls and its baselines, with greedy decoding.

The same workers as in training, an explicit router, outside admission.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.config import RunConfig
from cluster.run.asked import answer_tokens
from cluster.run.baselines import KnownBaselines
from cluster.run.fleet import Fleet, Reference, Stage
from cluster.run.metrics import attention_metrics
from cluster.run.routing import RouteClassifier, vote
from cluster.run.scoring import WaveReport
from cluster.watch.results import Result
from experts.expert import whole
from rewards.sources import Task
from rollout.draws import generator
from rollout.types import Prompt, RewardStatus, Sampling

Evaluation = dict[str, Result]
Ask = Callable[[Sequence[Prompt]], list[Stage]]
RIGHT = 0.99  # a verifier that grades in floats may fall short of 1 by rounding


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Tells evaluations of other prompts apart."""
    return hashlib.sha256("\n".join(prompt.key for prompt in prompts).encode()).hexdigest()


@dataclass(frozen=True)
class Answered:
    """Answers of one system to some prompts: 1 where the first is right, and the reports with all of them."""

    outcomes: list[int]
    reports: list[WaveReport]


class Evaluator:
    """Measures one router on one split.

    known: baselines measured before.
    """

    def __init__(self, config: RunConfig, fleet: Fleet, tasks: Mapping[str, Task], known: KnownBaselines) -> None:
        self.config, self.fleet, self.known = config, fleet, known
        self._without_verdict = 0
        self.tasks = {name: task for name, task in tasks.items() if task.config.weight > 0}
        self.experts = [expert.name for expert in config.experts]

    def prompts(self, split: str, count: int) -> list[Prompt]:
        """The first `count` distinct prompts of a split, task by task; ordinals are their positions."""
        return [p for task in self.tasks.values() for p in getattr(task, split)[:count]]

    async def router(self, prompts: Sequence[Prompt], router: Reference) -> tuple[Result, dict[str, float]]:
        """Accuracy with the prefix, and `attention/<task>/<expert>`."""
        answered = await self.answered(prompts, router, self.fleet.encode)
        groups = [group for report in answered.reports for group in report.groups]
        return self.result(prompts, answered.outcomes), attention_metrics(groups, self.experts)

    async def shuffled(self, prompts: Sequence[Prompt], router: Reference, within_task: bool) -> Result:
        """Every prompt gets the prefix of a donor with another gold answer: what a signature alone would give."""
        donors = donors_of(prompts, within_task, self.config.evaluation.seed)
        donor = dict(zip((id(prompt) for prompt in prompts), donors, strict=True))

        def ask(chunk: Sequence[Prompt]) -> list[Stage]:
            return self.fleet.encode([donor[id(prompt)] for prompt in chunk])

        return self.result(prompts, (await self.answered(prompts, router, ask)).outcomes)

    async def sampled(self, prompts: Sequence[Prompt], router: Reference, samples: int) -> dict[str, list[int]]:
        """Per task, how many of so many sampled answers to each prompt are right."""
        temperature = self.config.sampling.temperature
        answered = await self.answered(prompts, router, self.fleet.encode, temperature, samples)
        found: dict[str, list[int]] = {name: [] for name in self.tasks}
        for group in (group for report in answered.reports for group in report.groups):
            right = zip(group.statuses, group.right, strict=True)
            found[group.task].append(sum(self._outcome(status, value) for status, value in right))
        return found

    async def baselines(self, prompts: Sequence[Prompt], router: Reference) -> Evaluation:
        """Systems that no training of the router can change: measured once for equal models and prompts."""
        examples = self.prompts("train", self.config.evaluation.router_examples)
        path, without_verdict = self.known.path(prompts, examples), self._without_verdict
        if (found := self.known.read(path)) is not None:
            return found
        results = await self._measure_baselines(prompts, examples, router)
        if self._without_verdict == without_verdict:
            self.known.write(path, results)
        return results

    async def _measure_baselines(
        self, prompts: Sequence[Prompt], examples: Sequence[Prompt], router: Reference
    ) -> Evaluation:
        frozen = await self.answered(prompts, router, alone=True)
        results = {"frozen_policy": self.result(prompts, frozen.outcomes)}
        able = [place for place in range(len(self.experts)) if place not in self.fleet.encoders]
        if not able:
            return results
        await self.fleet.prepare(answers=True)
        own = [await self._own_answers(place, prompts) for place in able]
        known = [await self._own_answers(place, examples) for place in able]
        text = await self.answered(prompts, router, self._texts, alone=True)
        await self.fleet.prepare(answers=False)
        for place, (_, outcomes) in zip(able, own, strict=True):
            results[f"experts/{self.experts[place]}"] = self.result(prompts, outcomes)
        right, right_before = (np.array([outcomes for _, outcomes in each]) for each in (own, known))
        everyone = np.arange(len(prompts))
        chosen = vote([said for said, _ in own], right_before.mean(axis=1))
        results["majority"] = self.result(prompts, right[chosen, everyone].tolist())
        classifier = RouteClassifier(await self._features(examples), right_before)
        chosen = classifier.choose(await self._features(prompts))
        results["route_and_answer"] = self.result(prompts, right[chosen, everyone].tolist())
        results["oracle_route"] = self.result(prompts, right.max(axis=0).tolist())
        results["text"] = self.result(prompts, text.outcomes)
        if self.fleet.asked.what == "answers":
            await self.fleet.prepare(answers=True)
        return results

    def _texts(self, prompts: Sequence[Prompt]) -> list[Stage]:
        return self.fleet.answers(prompts, answer_tokens(self.config))

    async def answered(
        self,
        prompts: Sequence[Prompt],
        router: Reference,
        ask: Ask = lambda prompts: [],
        temperature: float = 0.0,
        samples: int = 1,
        **how: Any,
    ) -> Answered:
        """Answers, greedy unless a temperature is given.

        ask: what the experts are asked about some prompts.  how: as `RolloutWorker.generate` takes it, such as alone.
        """
        limit, stop = self.config.sampling.max_new_tokens, self.config.sampling.stop
        sampling = Sampling(temperature=temperature, max_new_tokens=limit, samples=samples, stop=stop)
        references: list[Reference] = []
        stages: list[Stage] = []
        size = self.config.evaluation.batch
        for index, at in enumerate(range(0, len(prompts), size)):
            chunk = list(prompts[at : at + size])
            asked = ask(chunk)
            features = [stage.reference for stage in asked]
            worker = self.fleet.rollouts[index % len(self.fleet.rollouts)]
            rollout = worker.call("generate", chunk, sampling, router, *features, training=False, **how)
            verifier = self.fleet.rewards[index % len(self.fleet.rewards)]
            references.append(verifier.call("score", rollout, returns=2)[1])
            stages += [*asked, Stage.of(worker, rollout), Stage.of(verifier, references[-1])]
        reports: list[WaveReport] = await self.fleet.get_all(references, "evaluation", stages=stages)
        groups = [group for report in reports for group in report.groups]
        return Answered([self._outcome(group.statuses[0], group.right[0]) for group in groups], reports)

    async def _own_answers(self, expert: int, prompts: Sequence[Prompt]) -> tuple[list[str], list[int]]:
        """An expert's own texts, and 1 where they are right."""
        messages = [prompt.messages for prompt in prompts]
        asked, verifier = self.fleet.copies[expert].handles[0], self.fleet.rewards[0]
        limit, stop = self.config.sampling.max_new_tokens, self.config.sampling.stop
        texts = asked.call("answer", messages, limit, stop)
        scores = verifier.call("score_texts", list(prompts), texts)
        stages = [Stage.of(asked, texts), Stage.of(verifier, scores)]
        what = f"the answers of expert {self.experts[expert]}"
        said, answered = await self.fleet.get_all([texts, scores], what, stages=stages)
        return said, [self._outcome(score.status, score.right) for score in answered]

    def _outcome(self, status: RewardStatus, right: float) -> int:
        self._without_verdict += status is not RewardStatus.OK
        return int(status is RewardStatus.OK and right >= RIGHT)

    async def _features(self, prompts: Sequence[Prompt]) -> np.ndarray:
        stages = self.fleet.states(prompts, keep=False)
        asked = [stage.reference for stage in stages]
        encoded = whole(await self.fleet.get_all(asked, "encoding for evaluation", stages=stages))
        return np.concatenate([np.stack([f.mean(axis=0) for f in e.features]) for e in encoded], axis=1)

    def result(self, prompts: Sequence[Prompt], outcomes: Sequence[int]) -> Result:
        """Accuracies by task, and their mean."""
        by_task: dict[str, list[int]] = {name: [] for name in self.tasks}
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            by_task[prompt.task].append(outcome)
        accuracies = {task: float(np.mean(values)) for task, values in by_task.items()}
        return {
            "tasks": accuracies,
            "mean": float(np.mean(list(accuracies.values()))),
            "prompts": {task: len(values) for task, values in by_task.items()},
            "outcomes": by_task,
        }


def donors_of(prompts: Sequence[Prompt], within_task: bool, seed: int) -> list[Prompt]:
    """For each prompt another one with another gold answer, of the same task or of any."""
    rng = generator(seed, "donors", str(within_task))
    chosen = []
    for prompt in prompts:
        pool = [p for p in prompts if p.answer != prompt.answer and (not within_task or p.task == prompt.task)]
        chosen.append(pool[rng.integers(len(pool))] if pool else prompt)
    return chosen


def summary_of(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The `eval` section of `summary.json`: without single outcomes, experts under their own key."""
    plain = {name: {k: v for k, v in result.items() if k != "outcomes"} for name, result in evaluation.items()}
    experts = {name.removeprefix("experts/"): r for name, r in plain.items() if name.startswith("experts/")}
    return {**{name: r for name, r in plain.items() if not name.startswith("experts/")}, "experts": experts}
