"""What the `config.json` of hub models says that recipes and pages name, for plans and tables without a download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB, MIB, KIB = 2**30, 2**20, 2**10


@dataclass(frozen=True)
class HubModel:
    """The shape of a decoder with gated feed-forward blocks; `bias` is that of queries, keys and values."""

    name: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    feedforward: int
    vocabulary: int
    longest: int
    tied: bool = True
    bias: bool = False

    @property
    def parameters(self) -> int:
        """All of them, norms included."""
        attention = self.width * self.head_size * 2 * (self.heads + self.kv_heads)
        attention += self.head_size * (self.heads + 2 * self.kv_heads) if self.bias else 0
        layer = attention + 3 * self.width * self.feedforward + 2 * self.width
        return self.layers * layer + self.width + self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token in bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_size * 2

    def described(self) -> dict[str, Any]:
        """As `experts.loading.describe` says it."""
        return {
            "hidden_size": self.width,
            "embedding_size": self.width,
            "layers": self.layers,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_size": self.head_size,
            "feedforward": self.feedforward,
            "vocabulary": self.vocabulary,
            "longest": self.longest,
            "tied": self.tied,
            "quantized": None,
            "stored_bytes": 0,
        }

    def row(self) -> str:
        """The start of its row in docs/experts.md; behind it stands the licence."""
        weights, features = 2 * self.parameters / GIB, 4 * self.width / KIB
        return (
            f"| `{self.name}` | {self.parameters / 1e9:.2f} B | {weights:.1f} GiB | {self.width} | {self.layers} "
            f"| {self.longest:,} | {features:.1f} KiB | {self.cache_bytes // KIB} KiB |"
        )


def _qwen(name: str, *shape: int, longest: int = 32768, tied: bool = True) -> HubModel:
    width, layers, heads, head_size, feedforward = shape
    return HubModel(name, width, layers, heads, 2, head_size, feedforward, 151936, longest, tied, bias=True)


HUB_MODELS = {
    model.name: model
    for model in (
        HubModel("HuggingFaceTB/SmolLM2-360M-Instruct", 960, 32, 15, 5, 64, 2560, 49152, 8192),
        _qwen("Qwen/Qwen2.5-0.5B-Instruct", 896, 24, 14, 64, 4864),
        _qwen("Qwen/Qwen2.5-Coder-0.5B-Instruct", 896, 24, 14, 64, 4864),
        HubModel("meta-llama/Llama-3.2-1B-Instruct", 2048, 16, 32, 8, 64, 8192, 128256, 131072),
        _qwen("Qwen/Qwen2.5-1.5B-Instruct", 1536, 28, 12, 128, 8960),
        _qwen("Qwen/Qwen2.5-Math-1.5B-Instruct", 1536, 28, 12, 128, 8960, longest=4096),
        _qwen("Qwen/Qwen2.5-Coder-1.5B-Instruct", 1536, 28, 12, 128, 8960),
        HubModel("HuggingFaceTB/SmolLM2-1.7B-Instruct", 2048, 24, 32, 32, 64, 8192, 49152, 8192),
        _qwen("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1536, 28, 12, 128, 8960, longest=131072, tied=False),
        HubModel("ibm-granite/granite-3.1-2b-instruct", 2048, 40, 32, 8, 64, 8192, 49155, 131072),
        _qwen("Qwen/Qwen2.5-3B-Instruct", 2048, 36, 16, 128, 11008),
    )
}
