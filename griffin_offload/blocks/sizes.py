"""The sizes of a model: what the planner calculates with (`model_shape` measures them)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from griffin_offload.blocks.base import padded
from griffin_offload.blocks.states import StateTensor
from griffin_offload.config import LAYERS, TIERS
from griffin_offload.formats.base import Format
from griffin_offload.formats.floats import FLOATS
from griffin_offload.kernels.by_blocks import scratch_bytes
from griffin_offload.method.allocation import Counts, tiers_of


@dataclass(frozen=True)
class NeuronSizes:
    """Of resident neurons in one format."""

    neuron_bytes: int
    """Bytes of all resident FF tensors that belong to one neuron."""
    fixed_bytes: int = 0
    """Those that belong to none: in int8, one scale per output of the down projection."""
    multiple: int = 1
    """Neurons come in multiples of so many."""

    def nbytes(self, kept: int) -> int:
        """Of tensors with room for `kept` neurons."""
        return padded(kept, self.multiple) * self.neuron_bytes + self.fixed_bytes


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one decoder layer: bytes of the precision that residents have, and of the one that is stored."""

    neurons: int
    levels: tuple[NeuronSizes, ...]
    """Of the neurons in each format that they may rest in."""
    ff_bytes: int
    """Bytes of the full FF as it is stored and streamed."""
    ff_flat_bytes: int
    """The same in one flat buffer, every tensor aligned."""
    attention_bytes: int
    norm_bytes: int
    """Norms, biases and whatever else has one axis."""
    window: int | None
    """Tokens the KV cache of this layer keeps; None keeps all."""
    plain_neuron_bytes: int = 0
    plain_attention_bytes: int = 0
    """A neuron, and the attention, without quantisation."""
    kv_width: int | None = None
    """Numbers per token in its keys and values together; None: the model's."""
    key_width: int | None = None
    """Of these, those of the keys; None: half of them."""
    kv_heads: int | None = None
    states: tuple[StateTensor, ...] = ()
    """Of convolutions and recurrences: what it keeps of a sequence, however long that is."""
    state_writer: str | None = None
    """The part of the layer that writes these and no KV entries."""
    mixing_bytes: int = 0
    """Activations per token while a recurrence or a convolution passes over a prompt."""
    experts: int = 0
    """Of a mixture of experts, which are its neurons: how many a token is sent to. 0: the FF is dense."""
    own_width: int | None = None
    """Numbers of a token that go into the down projection; None: one for every neuron."""
    finer: frozenset[str] = frozenset()
    """Names of matrices in the model's format for those of more bits."""
    whole_bytes: tuple[int | None, ...] = ()
    """By level, of all neurons on it where the down projection then rests in rows of outputs; None: it does not."""

    @property
    def width(self) -> int:
        return self.neurons if self.own_width is None else self.own_width

    @property
    def neuron_bytes(self) -> int:
        """Of one in the format of the most bits."""
        return self.levels[0].neuron_bytes

    def density(self, kept: int) -> float:
        """Of so many neurons; 1 where there are none to leave out."""
        return kept / self.neurons if self.neurons else 1.0

    def resident_ff_bytes(self, counts: Counts, *, streamed: bool = False) -> int:
        """Bytes of the compact FF with room for so many neurons on each level."""
        in_rows = self.bytes_in_rows(counts, streamed=streamed)
        return sum(self.levels[level].nbytes(kept) for level, kept in tiers_of(counts)) if in_rows is None else in_rows

    def bytes_in_rows(self, counts: Counts, *, streamed: bool) -> int | None:
        """The same where the down projection rests in rows of outputs; None where it does not."""
        (level, most), *_ = tiers_of(counts)
        return self.whole_bytes[level] if self.whole_bytes and 0 < most == self.neurons and not streamed else None


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model."""

    layers: tuple[LayerSizes, ...]
    embedding_bytes: int
    head_bytes: int
    """As it rests on the device; 0 when it rests as the embeddings, to which it is tied."""
    other_bytes: int
    """Outside the layers: last norm, learned positions, buffers."""
    item_bytes: int
    hidden_size: int
    vocab_size: int
    attention_width: int
    """Numbers per token in the queries of one layer."""
    heads: int
    kv_width: int
    """Numbers per token in the keys and values of the widest layer together."""
    kv_heads: int
    max_positions: int
    gated: bool
    inline_ff: bool
    """The FF is written in the layer's own forward (OPT): it is not chunked."""
    materialises_scores: bool
    """Attention builds the full matrix of scores (eager, ALiBi, soft-capped)."""
    stored_head_bytes: int = 0
    """0 when it is tied to the embeddings."""
    plain_embedding_bytes: int = 0
    plain_head_bytes: int = 0
    """Both without quantisation."""
    head: Format = FLOATS
    """Of the head as it rests on the device."""
    dtype: str = "bfloat16"
    """Of the computation."""
    precision: Format = FLOATS
    """Of the resident matrices inside the layers, but for FFs where these have several levels."""
    levels: tuple[Format, ...] = (FLOATS,)
    """Of resident FF neurons, from the most bits to the fewest."""
    by_layer: bool = False
    """All neurons of a layer are on one of these."""
    stored: Format = FLOATS
    """Of the same matrices in the checkpoint."""
    finer: Format | None = None
    """Of those among them that rest in more bits than the others (blocks/replace.py); None: there are none."""
    as_held: bool = False
    """Whether these are small ones and all that the file holds in more bits, and not small ones alone."""
    taken_over: float = 0.0
    """Share of the layers' numbers whose grids are taken over from the file."""

    @property
    def neurons(self) -> int:
        """Of the widest layer."""
        return max(layer.neurons for layer in self.layers)

    @property
    def width(self) -> int:
        """Numbers of a token that go into the widest down projection."""
        return max(layer.width for layer in self.layers)

    @cached_property
    def has_experts(self) -> bool:
        """Whether some layers are mixtures of experts: `density` then is the share of experts that are resident."""
        return any(layer.experts for layer in self.layers)

    @property
    def with_neurons(self) -> tuple[int, ...]:
        """Layers that have a feed-forward."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.neurons)

    def expert_slots_in_decode(self, slots: int) -> int:
        """Of `slots` beside a layer's places, what a token can need at once, and as many that the next layer may."""
        return min(slots, 2 * max(layer.experts for layer in self.layers))

    @property
    def scratch_bytes(self) -> int:
        """Of what linear layers share that are multiplied block by block."""
        layer = max(self.layers, key=lambda layer: layer.ff_bytes)
        width, matrices = max(self.hidden_size, layer.width), layer.ff_bytes or layer.plain_attention_bytes
        return scratch_bytes(width, max(format.scratch_rows for format in self.formats), matrices)

    @property
    def formats(self) -> tuple[Format, ...]:
        """Of all resident matrices inside the layers."""
        return tuple(dict.fromkeys((self.precision, *self.levels)))

    @property
    def is_plain(self) -> bool:
        """Whether none of them is quantised."""
        return all(format.is_plain for format in self.formats)

    @property
    def level_names(self) -> tuple[str, ...]:
        """What plans and reports call the levels: floats by the precision of the computation."""
        return tuple(self.dtype if format.is_plain else format.name for format in self.levels)

    @property
    def precision_name(self) -> str:
        """What they call all of it."""
        return self.level_names[0] if len(self.levels) == 1 else LAYERS if self.by_layer else TIERS

    @property
    def option(self) -> str:
        """What `--quantize` calls it."""
        return self.precision.name if len(self.levels) == 1 else self.precision_name

    def choosing(self, counts: Sequence[Counts]) -> tuple[int, ...]:
        """Layers of which a prompt chooses: neurons that are left out, or that rest in other formats than others."""
        sizes = enumerate(zip((layer.neurons for layer in self.layers), counts, strict=True))
        return tuple(i for i, (neurons, own) in sizes if sum(own) < neurons or len(tiers_of(own)) > 1)

    @property
    def tied(self) -> bool:
        """Whether head and embeddings are one table there."""
        return self.head_bytes == 0

    @property
    def head_is_copy(self) -> bool:
        """Whether the head is made of the embeddings' table, to which the checkpoint ties it, and rests beside it."""
        return self.head_bytes > 0 and self.stored_head_bytes == 0

    @property
    def state_bytes(self) -> int:
        """What all layers keep of one sequence beside its KV cache."""
        return sum(state.nbytes for layer in self.layers for state in layer.states)

    @property
    def splits_states(self) -> bool:
        """Whether wherever there are states a part of the layer writes them and nothing else."""
        return all(layer.state_writer is not None for layer in self.layers if layer.states)

    @property
    def state_writers(self) -> dict[int, str]:
        """By layer the part that writes its states, where it can run in parts and once more."""
        layers = enumerate(self.layers if self.splits_states else ())
        return {i: layer.state_writer for i, layer in layers if layer.state_writer is not None}

    def states_kept_bytes(self, pass_tokens: int) -> int:
        """The same; and where `pass_tokens` at once may be taken back, a copy of it, and what layers with states are
        given of those tokens."""
        given = sum(bool(layer.states) for layer in self.layers) * self.hidden_size * self.item_bytes
        return (1 + bool(pass_tokens)) * self.state_bytes + pass_tokens * given

    def _stored_attention(self, layer: LayerSizes) -> int:
        return layer.plain_attention_bytes if self.stored.is_plain else layer.attention_bytes

    @property
    def weight_bytes(self) -> int:
        """Of the model as it is stored."""
        layers = sum(layer.ff_bytes + self._stored_attention(layer) + layer.norm_bytes for layer in self.layers)
        return layers + self.embedding_bytes + self.stored_head_bytes + self.other_bytes
