"""`musketeers train`: refuse what must be refused, build what is missing, then run."""

from __future__ import annotations

import asyncio
import datetime
from functools import partial

from rich.console import Console

from cluster.config import ConfigError, RunConfig
from cluster.run import checkpoint
from cluster.run.folder import RunFolder
from cluster.run.models import ensure_models
from cluster.run.preflight import check_jail, check_models, check_names, check_prompts, check_start
from cluster.run.session import Session
from rewards.sources import build_tasks
from rewards.stream import PromptStream


def started_before(config: RunConfig) -> bool:
    """Whether there is a run of this name to go on with."""
    return RunFolder.of(config).started()


def train(config: RunConfig, resume: bool, overwrite: bool, console: Console, accept_licence: bool = False) -> int:
    """Runs a training job; returns the exit status (130 when it was stopped with a checkpoint).

    Raises:
        ValueError: one line for the user, before anything expensive starts.
    """
    check_names(config)
    folder = RunFolder.of(config)
    folder.lock()
    try:
        if not overwrite:
            folder.fetch()
        folder.check(config, resume, overwrite)
        saved = _saved(folder) if resume else None
        config = config.dated(folder.saved_config().data.date if resume else datetime.date.today())
        note = partial(console.print, highlight=False, soft_wrap=True)
        if not overwrite:
            folder.note_leftover(note)
        with console.status("making the tasks' prompts"):
            tasks = build_tasks(config.data)
        check_jail(config, tasks, note)
        ensure_models(config, note, accept_licence)
        check_models(config)
        if not resume:
            check_start(config)
        tasks = check_prompts(config, tasks, note)
        stream = PromptStream(tasks, config.data)
        if saved is not None:
            folder.check_data(stream, saved.driver, note)
        try:
            folder.prepare(config, overwrite)
            folder.write_data(stream)
            return asyncio.run(Session(config, folder, tasks, console).run()).status
        except BaseException as error:
            folder.withdraw(refused=isinstance(error, ConfigError))
            raise
        finally:
            folder.shared(console.print)
    finally:
        folder.unlock()


def _saved(folder: RunFolder) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from; None for a run that was killed before its first one."""
    if not checkpoint.steps(folder.checkpoints):
        folder.check_lost()
        return None
    return checkpoint.read_to_train(folder.checkpoints)
