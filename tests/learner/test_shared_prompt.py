"""The prompt computed once and shared by its completions, against each completion alone, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.logprobs import completion_logprobs
from rollout.sequence import lay_out_completions, lay_out_prompts
from tests.learner.naive import load_double, naive_logprobs

VALUES, GRADIENTS = 1e-10, 1e-6
PROMPTS = [[5, 9, 11], [7, 4], [20, 21, 22, 23, 24, 25, 26]]
# Equal ones within a group and across groups, and one that goes on with real tokens of the padding's id.
COMPLETIONS = [
    [[30, 31, 1], [32], [30, 31, 1]],
    [[1], [40, 41, 42, 43], [32]],
    [[50, 51], [50, 51, 0, 0], [52, 53, 54, 55]],
]
families = pytest.mark.parametrize("family", ["qwen2", "llama", "gpt_neox"])
positions = pytest.mark.parametrize("position", ["front", "after_bos"])


@families
@positions
def test_sharing_the_prompt_changes_neither_values_nor_gradients(policies, family, position):
    policy = load_double(policies[family])
    rng = np.random.default_rng(1)
    prefix = torch.from_numpy(rng.standard_normal((3, 2, policy.width))).requires_grad_(True)
    prompts = lay_out_prompts(PROMPTS, 2, policy.pad_id, position)
    laid = lay_out_completions(prompts, COMPLETIONS, policy.pad_id)
    found = completion_logprobs(policy, prompts, prefix, laid, 0.7).logprobs
    weights = torch.from_numpy(rng.standard_normal(tuple(found.shape)))
    (gradient,) = torch.autograd.grad((found * weights)[laid.valid].sum(), prefix)

    total = torch.zeros((), dtype=torch.float64)
    for row, completion in enumerate(c for group in COMPLETIONS for c in group):
        of = row // 3
        alone = naive_logprobs(policy, np.array(PROMPTS[of]), prefix[of], np.array(completion), 0.7, position)
        assert (found[row, : len(completion)] - alone).abs().max() < VALUES
        total = total + (alone * weights[row, : len(completion)]).sum()
    (wanted,) = torch.autograd.grad(total, prefix)
    assert (gradient - wanted).norm() < GRADIENTS * wanted.norm()
    assert wanted.flatten(1).norm(dim=1).min() > 0


@families
def test_without_a_prefix_the_frozen_policy_is_left(policies, family):
    policy = load_double(policies[family])
    prompts = lay_out_prompts(PROMPTS, 0, policy.pad_id)
    laid = lay_out_completions(prompts, COMPLETIONS, policy.pad_id)
    found = completion_logprobs(policy, prompts, None, laid, 1.3).logprobs
    for row, completion in enumerate(c for group in COMPLETIONS for c in group):
        alone = naive_logprobs(policy, np.array(PROMPTS[row // 3]), None, np.array(completion), 1.3, "front")
        assert (found[row, : len(completion)] - alone).abs().max() < VALUES
