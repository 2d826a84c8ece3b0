"""One layer of a cache by itself."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from experts.kv_cache import new_cache, one_layer


def test_what_is_written_to_one_layer_leaves_the_cache_as_it_is() -> None:
    config = Qwen3_5TextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    cache, tokens = new_cache(config), torch.tensor([[3, 4, 5], [6, 7, 8]])
    AutoModelForCausalLM.from_config(config).eval()(tokens, past_key_values=cache, use_cache=True)
    recurrent, attention = cache.layers
    state, keys = recurrent.recurrent_states[0], attention.keys
    rows = torch.tensor([1, 1, 0])

    taken = one_layer(cache, 0, rows)
    assert taken.layers[1] is None
    assert torch.equal(taken.layers[0].recurrent_states[0], state[rows])
    taken.layers[0].update_recurrent_state(torch.zeros(3))
    assert torch.equal(taken.layers[0].recurrent_states[0], torch.zeros(3))
    assert recurrent.recurrent_states[0] is state

    taken = one_layer(cache, 1, rows)
    taken.layers[1].update(keys[rows], keys[rows])
    assert taken.layers[1].get_seq_length() == 6
    assert attention.keys is keys and attention.get_seq_length() == 3
    assert torch.equal(one_layer(cache, 1).layers[1].keys, keys)
