"""Importing this module imports what every run needs: see `cluster.run.launched`."""

from __future__ import annotations

import matplotlib.figure
import reasoning_gym
import tensorboard

import cluster.cli
import cluster.run.session
import cluster.run.training
from experts.loading import import_transformers
from learner.engine import import_deepspeed

__all__ = ["cluster", "matplotlib", "reasoning_gym", "tensorboard"]

import_transformers()
import_deepspeed()
