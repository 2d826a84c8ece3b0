"""A run's metrics as TensorBoard events, in the run folder's `tensorboard/`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self


class Board:
    """Writes one scalar per metric and step.

    resume_after: the last step that stays when a run resumes; TensorBoard hides events after it.
    """

    def __init__(self, run_folder: Path, *, resume_after: int | None = None) -> None:
        # Importing TensorBoard takes a second or two and pulls in torch: only a run that writes events pays for it.
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _quiet(threading.excepthook)
        purge_step = None if resume_after is None else resume_after + 1
        self._writer = SummaryWriter(log_dir=str(run_folder / "tensorboard"), purge_step=purge_step, flush_secs=10)

    def step(self, step: int, metrics: Mapping[str, object]) -> None:
        """Write one step's metrics.  Whatever is not a number, such as a step's ordinals, is left out."""
        for name, value in metrics.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(name, float(value), global_step=step)

    def close(self) -> None:
        """Write what is still buffered."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _quiet(hook: Callable[[threading.ExceptHookArgs], object]) -> Callable[[threading.ExceptHookArgs], object]:
    """A full disk ends TensorBoard's writing thread; the next `step` raises what it raised, and nobody needs both."""

    def told(args: threading.ExceptHookArgs) -> object:
        of_tensorboard = args.thread is not None and type(args.thread).__module__.startswith("tensorboard.")
        return None if of_tensorboard and isinstance(args.exc_value, OSError) else hook(args)

    return told
