"""Shapes of the models that benchmarks make; routers are as uneven as trained ones."""

from dataclasses import dataclass

# hidden H, feed-forward F, layers L, attention heads, key/value heads, vocabulary V
SHAPES = {
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 32000),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "costs": (1024, 4096, 8, 16, 4, 8192),
    "tiny": (64, 256, 4, 4, 2, 512),
}


@dataclass(frozen=True)
class Mixture:
    """Of gpt-oss' kind: every layer has experts, and its router a bias."""

    hidden: int
    inner: int
    """Neurons of an expert."""
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: int
    active: int
    head_size: int = 64


MIXTURES = {
    "gpt-oss-20b": Mixture(2880, 2880, 24, 64, 8, 201088, 32, 4),
    "gpt-oss-half": Mixture(1440, 1440, 8, 32, 8, 32000, 32, 4),
    "gpt-oss-tiny": Mixture(64, 64, 3, 4, 2, 512, 8, 2),
}
ROUTER_SKEW = 0.8
"""Exponent of Zipf's law that the biases of routers follow, in another order in every layer."""
