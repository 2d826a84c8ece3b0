"""Task sources, held-out splits, verifiers, and the worker that scores completions in a jail."""

from rewards.verify import Unreadable

__all__ = ["Unreadable"]
