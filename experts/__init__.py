"""Frozen models: loading, encoding prompts to features, the feature cache, and the router over features."""
