"""What the page says of architectures on vLLM: that the product says the same, and that the numbers do."""

from __future__ import annotations

import pytest

from experts.architectures import expert_refusal, policy_refusal
from tests.architectures import ARCHITECTURES, configuration, documented, on_vllm
from tests.vllm.architectures import refused

# The attentions, windows, caps, norms, scales and recurrent layers that there are; `python -m tests.architectures
# --vllm` measures every architecture.
REPRESENTATIVE = (
    "llama",
    "mistral, window",
    "qwen3",
    "gemma2",
    "gemma3",
    "gemma4, per-layer embeddings",
    "phi3",
    "gpt_oss",
    "granite",
    "olmo2",
    "granitemoehybrid",
    "falcon_h1",
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_the_page_calls_refused_is_refused_and_nothing_else(name: str) -> None:
    config = configuration(name, "vllm")
    said = [refused(role, config) or "exact" for role in (policy_refusal, expert_refusal)]
    assert said == documented()[name][2:]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_numbers_of_representative_architectures_are_exact() -> None:
    """Each with an engine for the policy and two for the expert, one after the other."""
    rows = documented()
    assert on_vllm(REPRESENTATIVE) == {name: rows[name][2:] for name in REPRESENTATIVE}
