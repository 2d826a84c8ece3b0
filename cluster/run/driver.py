"""The training loop: two coroutines, continuous rollouts and continuous training, around one admission state.

Prompts flow as references from worker to worker; the router is the only thing that flows back.
With `max_staleness: 0` the same loop is synchronous training.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

from cluster.config import RunConfig
from cluster.run.admission import Admission
from cluster.run.calls import Features, Sent, Sink, Wave
from cluster.run.fleet import Fault, Fleet, Handle, Stage
from cluster.run.learning import Learning, LostGroupsError
from cluster.run.masking import VerifierHealth
from cluster.run.metrics import PipelineState, StepTimes, step_metrics
from cluster.run.recovery import Recovery, RunError
from cluster.run.scoring import GroupReport, WaveReport, wave_report
from learner.advantages import has_signal
from learner.gradient import Sums
from rewards.stream import PromptStream
from rollout.types import Group, Prompt, Rollout, Sampling


class Driver:
    """One run's loop.  `stop` may be set from outside: the step in progress is finished first."""

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        stream: PromptStream,
        admission: Admission,
        sink: Sink,
        recovery: Recovery,
        learning: Learning,
        verifiers: VerifierHealth,
    ) -> None:
        self.config, self.fleet, self.stream, self.admission, self.sink = config, fleet, stream, admission, sink
        self.recovery, self.learning, self.verifiers = recovery, learning, verifiers
        self.stop = asyncio.Event()
        self._wake: asyncio.Future[None] | None = None
        self.elapsed_s, self.samples, self._last = 0.0, 0, 0.0
        self._waves: dict[int, Wave] = {}
        self._fresh: list[WaveReport] = []
        self._filtered = 0
        self._load: Counter[str] = Counter()
        self._ahead: dict[int, Features] = {}
        self._sent: list[Sent] = []
        self._changed = asyncio.Condition()
        self._writing: asyncio.Task[None] | None = None
        sampling = config.sampling
        self._sampling = Sampling(
            temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
            samples=sampling.samples,
            stop=sampling.stop,
        )

    @property
    def step(self) -> int:
        """Updates done."""
        return self.admission.version

    def finished_at(self, ordinal: int) -> float:
        """When a finished group was scored, by the monotonic clock."""
        return self._waves[ordinal].finished

    def request_stop(self) -> None:
        """Ends the run after the step in progress; call from the loop's own thread."""
        self.stop.set()
        self._wake = asyncio.ensure_future(self._notify())

    async def run(self) -> None:
        """Trains until the configured number of steps, or until `stop` is set.

        Raises:
            RunError: when a worker keeps failing; a checkpoint of the last update is written before.
        """
        try:
            async with self.recovery.watchdog.watching(), asyncio.TaskGroup() as tasks:
                rollouts = tasks.create_task(self._rollouts())
                await self._training()
                rollouts.cancel()
        except BaseExceptionGroup as group:
            await self._save_if_possible()
            raise _first(group) from group

    def resume_with(self, finished: Sequence[Group]) -> None:
        """Takes over a checkpoint's finished groups; their features are encoded again."""
        if not finished:
            return
        rollout = Rollout(tuple(finished), tokens=0, hits=0, misses=0, seconds=0.0, encode_s=0.0)
        features = [stage.reference for stage in self.fleet.encode([group.prompt for group in finished])]
        wave = Wave(
            self.fleet.backend.put(rollout), features, wave_report(rollout, [group.scores for group in finished], 0.0)
        )
        self._waves.update(dict.fromkeys((group.ordinal for group in finished), wave))

    # Rollouts

    async def _rollouts(self) -> None:
        """Sends calls whenever admission has room for one."""
        async with asyncio.TaskGroup() as calls:
            while True:
                async with self._changed:
                    self._send_calls()
                    while not self._sent:
                        await self._changed.wait()
                        self._send_calls()
                sent, self._sent = self._sent, []
                for call in sent:
                    calls.create_task(self._receive(call))

    def _send_calls(self) -> None:
        """Sends all calls there is room for."""
        sent = []
        while not self.stop.is_set() and (ordinals := self._issue()):
            sent.append(self._send(ordinals))
        if sent:
            self._encode_ahead()
        self._sent += sent

    def _issue(self) -> list[int]:
        a, size = self.admission, self.config.prompts_per_call
        busy = self.config.pipeline.calls_per_worker
        if all(self._load[worker.name] >= busy for worker in self.fleet.rollouts):
            return []
        # A smaller call only where waiting for a full one could wait for ever.
        if a.capacity >= size or a.retry or (a.capacity > 0 and not a.running and a.batch() is None):
            return a.issue(size)
        return []

    def _send(self, ordinals: list[int]) -> Sent:
        """Some prompts through experts, policy and verifiers."""
        prompts = [self.stream.prompt(ordinal) for ordinal in ordinals]
        stages = self._encode(prompts)
        features = [stage.reference for stage in stages]
        policy, verifier = self._idlest(self.fleet.rollouts), self._idlest(self.fleet.rewards)
        rollout, sampled = policy.call("sample", prompts, self._sampling, self.learning.router, *features, returns=2)
        scored, report = verifier.call("score", rollout, returns=2)
        stages = [*stages, Stage.of(policy, rollout), Stage.of(verifier, report)]
        self._load.update([policy.name, verifier.name])
        return Sent(ordinals, stages, sampled, scored, report, features, policy.name, verifier.name)

    async def _receive(self, sent: Sent) -> None:
        """What comes of a call; on failure its prompts are to run again."""
        what, held = _prompts(sent.ordinals), [sent.verifier, sent.policy]
        try:
            await self.fleet.get(sent.sampled, what, stages=sent.stages)
            self._load.subtract([held.pop()])
            await self._notify()
            report = await self.fleet.get(sent.report, what, stages=sent.stages)
        except self.fleet.backend.errors as error:
            fault = await self.recovery.after(error, sent.stages)
            # What was made ahead may be of the worker that is gone.
            self._ahead.clear()
            if fault.kind == "lost":
                self.learning.publish()
            async with self._changed:
                for ordinal in self.admission.fail(sent.ordinals, blameless=fault.kind == "lost"):
                    self.sink.dead(ordinal, self.stream.prompt(ordinal).task, fault)
                self._changed.notify_all()
            return
        finally:
            self._load.subtract(held)
        self.recovery.succeeded([stage.handle for stage in sent.stages])
        self._fresh.append(report)
        self.verifiers.observe(report.groups)
        async with self._changed:
            self._waves.update(dict.fromkeys(sent.ordinals, Wave(sent.scored, sent.features, report)))
            self.admission.finish(sent.ordinals, {group.ordinal: group.bytes for group in report.groups})
            if self.config.algorithm.dynamic_sampling:
                self._filter(report.groups)
            self._changed.notify_all()

    def _encode(self, prompts: list[Prompt]) -> list[Stage]:
        ahead = self._ahead.pop(prompts[0].ordinal, None)
        return ahead.experts if ahead is not None and ahead.prompts == prompts else self.fleet.encode(prompts)

    def _encode_ahead(self) -> None:
        """Features do not depend on the router: those of the next update are made while this one's prompts sample."""
        if not self.fleet.backend.survives:
            return
        size, upcoming = self.config.prompts_per_call, self.admission.upcoming(self.config.learner.groups)
        self._ahead = {first: features for first, features in self._ahead.items() if first in upcoming}
        for at in range(0, len(upcoming) - size + 1, size):
            if upcoming[at] not in self._ahead:
                prompts = [self.stream.prompt(ordinal) for ordinal in upcoming[at : at + size]]
                self._ahead[upcoming[at]] = Features(prompts, self.fleet.encode(prompts))

    def _idlest(self, handles: Sequence[Handle]) -> Handle:
        return min(handles, key=lambda handle: self._load[handle.name])

    def _filter(self, groups: Sequence[GroupReport]) -> None:
        """Dynamic sampling: groups without signal end here, and others are sampled in their place."""
        flat = [group for group in groups if not has_signal(group.rewards, group.statuses)]
        self._note(flat)
        self.admission.filter([group.ordinal for group in flat])
        self.samples += sum(len(group.statuses) for group in flat)
        for group in flat:
            del self._waves[group.ordinal]
        self._filtered += len(flat)

    def _note(self, groups: Sequence[GroupReport]) -> None:
        """Lets the stream know how prompts were answered that have ended."""
        for group in groups:
            if (share := group.right_share) is not None:
                self.stream.note(group.task, group.ordinal, share)

    # Training

    async def _training(self) -> None:
        """Forms batches as they become ready and updates the router."""
        self._last = time.perf_counter()
        while self.step < self.config.steps and not self.stop.is_set():
            batch = await self._next_batch()
            if batch is None:
                break
            before = self.step
            await self._update(batch)
            if self.step == before:
                continue
            if self.step % self.config.checkpoint.every == 0 or self.step == self.config.steps:
                await self.save()
            begun = time.perf_counter()
            await self.learning.again(lambda: self.sink.validate(self.step, self.learning.router))
            self._last += time.perf_counter() - begun  # measuring is not training
        await self._written()
        if self.step % self.config.checkpoint.every and self.step < self.config.steps:
            await self.save()

    async def _next_batch(self) -> list[int] | None:
        async with self._changed:
            while not self.stop.is_set():
                if (batch := self.admission.batch()) is not None:
                    return batch
                await self._changed.wait()
        return None

    async def _update(self, batch: list[int]) -> None:
        """One update, and its record; none when some of the batch turned out to be lost."""
        version, start = self.step, time.perf_counter()
        waves = list({id(self._waves[o]): self._waves[o] for o in batch}.values())
        try:
            parts = [w.rollout for w in waves] + [f for w in waves for f in w.features]
            results = await self.learning.update(batch, parts)
        except LostGroupsError as error:
            await self._run_again(batch, error.fault)
            return
        learner_s = time.perf_counter() - start
        by_ordinal = {group.ordinal: group for wave in waves for group in wave.report.groups}
        groups = [by_ordinal[ordinal] for ordinal in batch]
        self.samples += sum(len(group.statuses) for group in groups)
        async with self._changed:
            for ordinal in batch:
                del self._waves[ordinal]
            self.admission.train(batch)
            self._note(groups)
            self.stream.advance(self.admission.next_ordinal)
            state = PipelineState(
                filtered=self._filtered,
                running=len(self.admission.running),
                waiting=len(self.admission.finished),
                restarts=sum(self.recovery.restarts.values()),
                levels=self.stream.levels(),
                workers={"rollout": len(self.fleet.rollouts), "reward": len(self.fleet.rewards)},
            )
            self._filtered = 0
            self._changed.notify_all()
        # The next rollouts start first: what only concerns the records happens beside them, but before any
        # wait, so that a checkpoint never knows a step that the log does not.
        self._send_calls()
        fresh, self._fresh = self._fresh, []
        learned = Sums.merged([r.sums for r in results]), results[0].grad_norm
        now = time.perf_counter()
        times = StepTimes(now - self._last, learner_s)
        self.elapsed_s, self._last = self.elapsed_s + now - self._last, now
        experts = [expert.name for expert in self.config.experts]
        metrics = step_metrics(fresh, groups, experts, version, learned, times, state)
        versions = [group.version for group in groups]
        self.sink.step({"step": version + 1, "ordinals": batch, "versions": versions, **metrics})
        if self.config.checkpoint.groups:
            await self._written()
            self._writing = asyncio.create_task(self._keep_groups(version + 1, batch, waves))

    async def _run_again(self, batch: list[int], fault: Fault) -> None:
        """Groups whose data is gone with a node: their prompts run again."""
        self.recovery.note(f"{fault}; {len(batch)} prompts run again")
        self._ahead.clear()
        async with self._changed:
            for ordinal in batch:
                del self._waves[ordinal]
            self.admission.drop(batch)
            self._changed.notify_all()

    # Records

    async def _keep_groups(self, step: int, batch: list[int], waves: list[Wave]) -> None:
        self.sink.groups(step, await self._groups(batch, waves))

    async def _groups(self, ordinals: Sequence[int], waves: Sequence[Wave]) -> list[Group]:
        rollouts = await self.fleet.get_all([wave.rollout for wave in waves], "finished groups")
        wanted = set(ordinals)
        kept = [group for rollout in rollouts for group in rollout.groups if group.ordinal in wanted]
        return sorted(kept, key=lambda group: group.ordinal)

    async def _written(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            await writing
        except self.fleet.backend.errors as error:
            fault = self.fleet.backend.fault(error, self.fleet)
            self.recovery.note(f"a step's groups are trained but could not be kept for replay: {fault}")

    async def save(self) -> None:
        """Writes a checkpoint of this moment."""
        await self._written()
        learner = await self.learning.state()
        while True:
            finished = sorted(self.admission.finished)
            waves = list({id(self._waves[o]): self._waves[o] for o in finished}.values())
            driver = {
                "admission": self.admission.state(),
                "stream": self.stream.state(),
                "elapsed_s": self.elapsed_s,
                "samples": self.samples,
                "recovery": self.recovery.state(),
            }
            try:
                groups = await self._groups(finished, waves)
                break
            except self.fleet.backend.errors as error:
                await self._run_again(finished, await self.recovery.after(error))
        self.sink.checkpoint(self.step, learner, driver, groups)

    async def _save_if_possible(self) -> None:
        """After a failure: the last update is whole in this process, only finished groups may be out of reach."""
        expected: tuple[type[Exception], ...] = (*self.fleet.backend.errors, RunError, OSError)
        try:
            await self.save()
        except expected:
            self.recovery.note("no checkpoint of the last step could be written; the one before is whole")

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _prompts(ordinals: Sequence[int]) -> str:
    return f"prompts {ordinals[0]} to {ordinals[-1]}" if len(ordinals) > 1 else f"prompt {ordinals[0]}"


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first single error of a group of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
