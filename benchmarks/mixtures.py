"""Shapes of mixtures of experts that benchmarks make, with routers as uneven as trained ones."""

from dataclasses import dataclass


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
