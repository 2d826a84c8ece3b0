"""Whether the learner's way through a policy has the values and the gradient of the model itself."""

from __future__ import annotations

import torch

from experts.loading import FrozenModel
from experts.selfcheck import Finding, Probe, at_most, logprob_error, look, plain_logits, tolerance
from learner.logprobs import completion_logprobs
from rollout.sequence import PrefixPosition, lay_out_completions, lay_out_prompts


def check_learner(policy: FrozenModel, position: PrefixPosition, checkpoint_activations: bool = False) -> list[Finding]:
    """Log-probabilities that go on from a cached mixed batch, and d / d prefix, against every completion alone."""
    probe, limits, head = Probe.of(policy), tolerance(policy), 1 if position == "after_bos" else 0
    slots, samples, device = probe.prefix.shape[1], len(probe.answers[0]), policy.device
    shown = torch.tensor(probe.open)[:, None].expand(-1, slots)
    sums: list[tuple[torch.Tensor, torch.Tensor]] = []  # of log-probabilities, and the prefix that they depend on

    def values() -> tuple[bool, str]:
        leaf = probe.prefix.clone().requires_grad_(True)
        prompts = lay_out_prompts(probe.tokens, slots, policy.pad_id, position, shown, device)
        behind = lay_out_completions(prompts, probe.answers, policy.pad_id)
        found = completion_logprobs(policy, prompts, leaf, behind, 1.0, checkpoint_activations).logprobs
        own, total, errors = probe.prefix.clone().requires_grad_(True), torch.zeros((), device=device), []
        for row, tokens in enumerate(tokens for group in probe.answers for tokens in group):
            of = row // samples
            prefix = own[of] if probe.open[of] else None
            logits = plain_logits(policy, probe.tokens[of], prefix, head, tokens)
            errors.append(logprob_error(found[row].detach().cpu().numpy(), logits.detach(), tokens, 1.0))
            if prefix is not None:
                logprobs = logits[:-1].log_softmax(dim=-1)
                total = total + logprobs.gather(1, torch.tensor(tokens, device=device)[:, None]).sum()
        sums.extend([(found.sum(), leaf), (total, own)])
        worst = max((error / spread) ** 0.5 for error, spread in errors)
        return at_most(worst, limits.values, "the logits' spread" + probe.unreached)

    def gradient() -> tuple[bool, str]:
        if not sums:
            return False, "it was not measured"
        if not all(total.requires_grad for total, _ in sums):
            return False, "log-probabilities do not depend on the prefix"
        found, wanted = (torch.autograd.grad(total, prefix)[0] for total, prefix in sums)
        if not (found.isfinite().all() and found.any()):
            return False, f"d log-probability / d prefix is {'zero' if found.isfinite().all() else 'not finite'}"
        least = 0.05 * wanted.norm()  # a window may leave a row next to nothing of its own
        worst = max(((a - b).norm() / b.norm().clamp_min(least)).item() for a, b in zip(found, wanted, strict=True))
        return at_most(worst, limits.gradient, "d log-probability / d prefix")

    return [look("learner", values), look("gradient", gradient)]
