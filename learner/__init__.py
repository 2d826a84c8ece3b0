"""Advantages, losses, prefix-conditioned log-probabilities, and the DeepSpeed learner that updates only the router."""
