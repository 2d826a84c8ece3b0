"""Baselines in which an expert answers itself: sent there by a small classifier, or outvoting the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(init=False)
class RouteClassifier:
    """One logistic regression an expert on all experts' features: will this expert be right?

    Args:
        features: (prompts, width) of training prompts.
        right: (experts, prompts) 1 where the expert's own answer was right.
    """

    def __init__(self, features: np.ndarray, right: np.ndarray) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self._models = [
            make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500)).fit(features, labels)
            if 0 < labels.mean() < 1
            else float(labels.mean())
            for labels in right
        ]

    def choose(self, features: np.ndarray) -> np.ndarray:
        """(prompts,) index of the expert most likely to be right."""
        chances = [
            np.full(len(features), model) if isinstance(model, float) else model.predict_proba(features)[:, 1]
            for model in self._models
        ]
        return np.argmax(chances, axis=0)


def vote(answers: Sequence[Sequence[str]], trust: np.ndarray) -> np.ndarray:
    """(prompts,) index of an expert with the answer that most experts give; of equals, of the most trusted one's.

    Args:
        answers: of each expert, one a prompt; blanks around them do not count.
        trust: (experts,) such as the accuracy on training prompts.
    """
    order = np.argsort(-trust, kind="stable")
    chosen = []
    for said in zip(*answers, strict=True):
        plain = [text.strip() for text in said]
        votes = Counter(plain)
        chosen.append(max(order, key=lambda expert: votes[plain[expert]]))
    return np.array(chosen, dtype=int)
