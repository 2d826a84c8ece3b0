"""Prompts in, completions out: types, the layout of sequences, policy engines, the rollout worker."""
