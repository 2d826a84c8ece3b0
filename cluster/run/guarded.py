"""A command from its start to its exit status."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from cluster.run.environment import PROCESS_ENVIRONMENT

STORAGE_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EIO}

errors = Console(stderr=True)


def guarded(command: Callable[[], None]) -> None:
    """Runs a command: what a user did wrong is one line and exit status 2, never a traceback."""
    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        command()
    except ValueError as error:
        if not _is_own(error):
            raise
        errors.print(f"[bold red]error:[/] {escape(' '.join(str(error).split()))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except RuntimeError as error:
        if not _is_own(error):
            raise
        errors.print(f"[bold red]the run stopped:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except BrokenPipeError:
        os._exit(141)  # as a command that SIGPIPE ends, such as `musketeers logs RUN -f | head`
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        place = error.filename or "the run's folder"
        errors.print(
            f"[bold red]the run stopped:[/] {place} cannot be written: {error.strerror}; put that right and go on "
            "with --resume, the last checkpoint is whole",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted before training began; nothing was lost", highlight=False)
        sys.exit(130)


def _is_own(error: Exception) -> bool:
    """Errors of our own that name a remedy; anything else is a bug and keeps its traceback."""
    return type(error).__module__.split(".")[0] in ("experts", "rollout", "rewards", "learner", "cluster")
