"""A server's metrics for Prometheus, through the agents of its Ray cluster, beside those of Ray Serve itself."""

from __future__ import annotations

from ray.util.metrics import Counter, Histogram

from cluster.serve.panel import Seen

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]


class Measures:
    """Of one model.  The names in Prometheus are those here behind `ray_`."""

    def __init__(self, model: str) -> None:
        def counter(name: str, text: str, *keys: str) -> Counter:
            made = Counter(f"musketeers_serve_{name}", description=text, tag_keys=("model", *keys))
            made.set_default_tags({"model": model})
            return made

        def histogram(name: str, text: str) -> Histogram:
            made = Histogram(f"musketeers_serve_{name}", description=text, boundaries=SECONDS, tag_keys=("model",))
            made.set_default_tags({"model": model})
            return made

        self._requests = counter("requests_total", "requests that have ended, by how", "outcome")
        self._tokens = counter("tokens_total", "tokens of prompts and of answers", "kind")
        self._masked = counter("masked_total", "prompts that an expert was missing for", "expert")
        self._seconds = histogram("request_seconds", "from a request to the end of its answer")
        self._first = histogram("first_token_seconds", "from a streamed request to its first token")
        self._experts = histogram("experts_seconds", "from asking the experts to the last one's answer")

    def asked(self, seen: Seen, seconds: float) -> None:
        """The experts have answered."""
        self._experts.observe(seconds)
        for name in seen.missing:
            self._masked.inc(tags={"expert": name})

    def first(self, seconds: float) -> None:
        """A stream's first token."""
        self._first.observe(seconds)

    def used(self, prompt: int, answer: int) -> None:
        """Tokens."""
        self._tokens.inc(prompt, tags={"kind": "prompt"})
        self._tokens.inc(answer, tags={"kind": "answer"})

    def ended(self, outcome: str, seconds: float) -> None:
        """A request has ended: `ok`, `left` by its client, `refused` (its own fault), `timeout` or `failed` (ours)."""
        self._requests.inc(tags={"outcome": outcome})
        self._seconds.observe(seconds)
