"""Every default, once. The Python API and the command line both read them from here.

Shape notation of the whole package: B batch, T tokens, H hidden size, F feed-forward neurons of a layer,
K kept neurons of a layer, L layers, V vocabulary. GB is 10**9 bytes, GiB is 2**30.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from griffin_offload.errors import UsageError

DEVICE_NAMES = ["auto", "cuda", "xpu", "mps", "cpu"]
"""The kinds in devices/registry.py, which adds those that are registered later."""
Offload = Literal["auto", "ram", "disk"]
SelectionMethod = Literal["topk", "output_aware", "sample", "topk_sample", "random", "magnitude"]
BatchStatistic = Literal["sum", "mean"]
# Weight formats (formats/) by name, from the most to the fewest bits; `register_format` keeps it.
FORMAT_NAMES: list[str] = ["none", "int8", "int4", "int3", "int2"]
LAYERS, TIERS = "layers", "tiers"
"""What options and plans call residents in several formats: whole layers of one each, or a layer's neurons."""
MIXED = (LAYERS, TIERS)
# Of embeddings and head in a converted copy, by the bits that the command line asks for.
TABLE_FORMATS = {"16": "none", "int8": "int8"}
Preference = Literal["quality", "speed"]
ExportForm = Literal["unquantized", "w8a16", "w4a16", "gguf", "gguf-q8_0", "gguf-q4_0"]
DType = Literal["auto", "bfloat16", "float16", "float32", "float64"]
KVBits = Literal[16, 8, 4]
AskedKVBits = Literal["auto", 16, 8, 4]
Overflow = Literal["error", "drop"]
WindowStart = Literal["even", "documents"]
EvalMode = Literal["gen", "class", "strict"]
BosRule = Literal["paper", "tokenizer"]
MissingExperts = Literal["fetch", "route", "host"]
CacheKind = Literal["ours", "static", "dynamic"]
Refresh = Literal["turn", "never"] | int
Density = float | Sequence[float]

# Names as they come in Host headers, addresses of IPv6 with or without brackets; origins as browsers send them.
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[?[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]?")
_ORIGIN = re.compile(r"\*|[A-Za-z][A-Za-z0-9+.-]*://[^/\s]+/?")
# Fewer neurons than this were never useful in the paper; the planner refuses instead of going lower.
MIN_AUTO_DENSITY = 0.25
# Kept neurons come in multiples of this where F is one: GEMM kernels and quantised groups want it.
NEURON_MULTIPLE = 64
# Drafts at once in exact mode: what is planned for when nobody says, and the most that layers with a window take back.
AUTO_DRAFT_TOKENS = 16
MAX_DRAFT_TOKENS = 31
# Tokens of prompts that pass together where nothing is streamed and the CPU computes: what they save is reading the
# residents, and the first of them waits for all.
RESIDENT_PROMPT_TOKENS = 256
# More were never of use, and a process in which some could not be started can start none afterwards.
MAX_THREADS = 1024
# Selections by norms of the weights, of which a table is kept.
WEIGHT_NORMS = ("output_aware", "magnitude")
# Sequences that are decoded in one step when nobody says: the kernels for few rows gain little beyond.
MOST_TOGETHER = 8
# The context when nobody says one: precision and density are solved with room for the floor; what they leave over
# makes it longer, up to the largest, and where nothing fits it is shorter, down to the smallest.
MIN_AUTO_CTX, FLOOR_AUTO_CTX, MAX_AUTO_CTX = 256, 2048, 4096


@dataclass(frozen=True)
class LoadConfig:
    """How a model is loaded and what it may use. Field names are the API's arguments and the CLI's flags."""

    max_gpu_mem: str | int = "auto"
    """The device budget: "12GB", "12GiB", "80%", bytes, or "auto" (free memory less a margin)."""
    max_cpu_mem: str | int | None = None
    """What the host may hold of the offloaded weights when the device is not the CPU; None: what is free."""
    device: str = "auto"
    density: Density | Literal["auto"] = "auto"
    """Fraction of FF neurons kept, one number or one per layer; "auto" is all of them, or in the last
    precision that is left to try the most that fit."""
    dtype: DType = "auto"
    """Precision of the computation; "auto" is the one that is stored."""
    quantize: str = "auto"
    """Precision of the resident matrices inside the layers: "none" keeps the stored one, "auto" is the first of none,
    int8, int8 and int4 by layers, and int4 in which all neurons fit, else layers or tiers of fewer bits (with a density
    that is given, or of experts, the last); a converted checkpoint has one already. "layers": each layer is of one
    format, and nothing passes for a prompt; "tiers": the same above int4, and below each prompt says which neurons of a
    layer rest in how many bits, or are left out."""
    prefer: Preference = "quality"
    """What "auto" is after: the most bits that fit, or ("speed") those of the fewest bits in which no neuron has to be
    left out, int4, even where more would fit: a token takes as long as its bytes."""
    bits: float | Literal["auto"] = "auto"
    """With quantize="tiers" or "layers", bits per weight of the FFs, scales and what is left out included; "auto" is
    what fits."""
    offload: Offload = "auto"
    ctx_size: int | None = None
    """Tokens of prompt and answer that the KV cache is planned for; None: at least FLOOR_AUTO_CTX if that fits with the
    fewest bits and neurons, and what the best precision and density leave over, up to MAX_AUTO_CTX."""
    prompt_tokens: int | None = None
    """Longest prompt that is planned for; None: the whole context."""
    kv_bits: AskedKVBits = "auto"
    """16: the KV cache as it is computed, whatever the precision; 8: as int8 with a scale per token and head; 4: in
    groups of 32 numbers of a head, each with a step and a least number; "auto": 8 where 16 would cost all matrices
    bits, or neurons, and it need not be as computed (exact mode)."""
    batch_size: int = 1
    """Sequences at once (beams count) that are planned for."""
    sequences: int = 1
    """Answers at once, each with a KV cache of its own for the whole context (`generate_many`), that are planned
    for."""
    missing_experts: MissingExperts = "fetch"
    """Of a mixture of experts, what happens to a token that is sent to an expert that is not resident: it is read from
    where it rests ("fetch"), the router chooses among the residents alone ("route"), or, where the device is not the
    CPU, the CPU computes it ("host")."""
    selection: SelectionMethod = "topk"
    batch_statistic: BatchStatistic = "sum"
    """How samples share experts: the sum of s^2, or the mean of s^2 / S ("mean"); METHOD: batch > 1."""
    seed: int = 0
    exact: bool = False
    """The full model's own tokens: the residents draft, streamed passes of the full model verify."""
    draft_tokens: int | None = None
    """Drafts per verifying pass; None: chosen by what is accepted and what a pass costs, at most AUTO_DRAFT_TOKENS."""
    lookup: bool | None = None
    """Drafts from the text itself, where the last tokens were there before: as many as measured seconds say that it
    pays. None: where a trial shows that rows computed together are the same to the last bit; and in exact mode. Where
    draft_tokens is given exact mode has none."""
    refresh: Refresh = "turn"
    """When neurons are chosen anew: with every prompt ("turn"; in exact mode with every pass, too), with a
    conversation's first one alone ("never"; in exact mode with every prompt), or with every prompt and by a streamed
    pass after every so many generated tokens."""
    decay: float = 0.8
    """Share of the statistic so far that remains when a pass between tokens adds its own; turns just add."""
    keep_prompts: bool = False
    """Memory is planned for prompts that are kept and continued: conversations, saved prompts."""
    session_mem: str | int | None = None
    """Part of the device budget set aside for contexts that are kept beside the one in use; None: none."""
    ff_chunk_tokens: int | None = None
    """Tokens that go through a full FF at once: bounds the workspace, not the result. None: by the slot's size."""
    threads: int | None = None
    """Threads that compute on the CPU; None: OMP_NUM_THREADS, else by a short timed trial."""
    cuda_graphs: bool = True
    """On CUDA, capture the decode of one token and replay it; off: every kernel is launched by itself."""
    offline: bool = False
    adapter: str | None = None
    """Directory or hub id of a LoRA adapter (peft), which is merged into the weights while they pass."""
    always_stream: bool = False
    """Stream layers that fit whole, too: for tests and measurements of the streamed pass."""

    def __post_init__(self) -> None:
        _one_of("device", self.device, tuple(DEVICE_NAMES))
        named = (("offload", Offload), ("missing_experts", MissingExperts), ("selection", SelectionMethod))
        for name, kind in (
            *named,
            ("batch_statistic", BatchStatistic),
            ("dtype", DType),
            ("kv_bits", AskedKVBits),
            ("prefer", Preference),
        ):
            _one_of(name, getattr(self, name), get_args(kind))
        _one_of("quantize", self.quantize, ("auto", *FORMAT_NAMES, *MIXED))
        check_density(self.density)
        _check_tiers(self)
        if self.prefer == "speed" and (self.quantize, self.density, self.exact) != ("auto", "auto", False):
            raise UsageError(
                "prefer='speed' (--prefer speed) chooses a precision for all neurons: give it without quantize, "
                "density and exact"
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}: from 0 to 2**63 - 1")
        if self.ctx_size is not None and self.ctx_size < 2:
            raise UsageError(f"ctx_size is {self.ctx_size}: it has to hold a prompt and an answer, 2 or more")
        check_refresh(self.refresh, self.exact)
        if not 0 <= self.decay <= 1:
            raise UsageError(f"decay is {self.decay}: from 0, only the last pass chooses, to 1, nothing is forgotten")
        if self.draft_tokens is not None and not self.exact:
            raise UsageError("draft_tokens is for exact mode: add --exact (exact=True)")
        if self.draft_tokens is not None and not 1 <= self.draft_tokens <= MAX_DRAFT_TOKENS:
            raise UsageError(f"draft_tokens is {self.draft_tokens}: from 1 to {MAX_DRAFT_TOKENS}")
        _at_least_one(self, "ff_chunk_tokens", "batch_size", "sequences", "prompt_tokens", "threads")
        if self.threads is not None and self.threads > MAX_THREADS:
            raise UsageError(
                f"threads is {self.threads}: at most {MAX_THREADS}, and more than there are cores only wait"
            )


@dataclass(frozen=True)
class RunConfig:
    """What `griffin-offload run` generates when not told otherwise; None leaves it to the checkpoint."""

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class BenchConfig:
    """What `griffin-offload bench` measures when not told otherwise."""

    prompt_tokens: int = 512
    generate_tokens: int = 128
    repeats: int = 5


@dataclass(frozen=True)
class ServeConfig:
    """What `griffin-offload serve` lets in, and how much of it."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    served_name: str | None = None
    """The model's name in requests; None: the last part of its path or hub id."""
    api_key: str | None = field(default=None, repr=False)
    allow_host: tuple[str, ...] = ()
    """Names in the Host header that are answered beside localhost and the bound address."""
    cors_origin: tuple[str, ...] = ()
    """Web pages whose scripts may ask."""
    parallel: int | Literal["auto"] = "auto"
    """Requests that are answered at once; "auto": up to MOST_TOGETHER, as far as the budget has room for their KV
    caches, but one after the other where they would have to share a choice of neurons."""
    queue_size: int = 16
    """Requests that wait for those that are answered; further ones are told to come again."""
    idle_unload_s: float | None = None
    """After so long without a request the model's memory is given back; None: never."""
    max_body: str | int = "2MB"
    max_prompt_tokens: int | None = None
    """None: what the context holds."""
    max_output_tokens: int | None = None
    """Of one answer; None: what the context holds."""
    max_sessions: int = 64
    """Conversations kept beside the current one, if the budget holds so many."""
    max_choices: int = 8
    """Answers to one request: prompts times `n`."""
    request_timeout_s: float = 600.0
    """From the first byte of a request to the last of its answer, waiting included."""
    shutdown_grace_s: float = 10.0
    """How long a running answer may go on after SIGTERM or Ctrl-C."""
    max_connections: int = 128
    page: bool = True
    """Whether a page for people is at /."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise UsageError(f"port is {self.port}: from 0 to {2**16 - 1}")
        _at_least_one(self, "queue_size", "max_sessions", "max_choices", "max_connections")
        if self.parallel != "auto":
            _at_least_one(self, "parallel")
        _at_least_one(self, "max_prompt_tokens", "max_output_tokens")
        for host in self.allow_host:
            if not _HOST.fullmatch(host):
                raise UsageError(f"allow_host is {host!r}: give a name or an address, without scheme and port")
        for origin in self.cors_origin:
            if not _ORIGIN.fullmatch(origin):
                raise UsageError(f"cors_origin is {origin!r}: write https://example.org, or * for any")


@dataclass(frozen=True)
class ChatConfig:
    """How a conversation behaves."""

    on_overflow: Overflow = "error"
    """When the context is full: the message is refused, or the oldest turns are dropped."""
    max_new_tokens: int = 1024
    """Of one answer; fewer where the context has no room for so many."""


def _check_tiers(config: LoadConfig) -> None:
    if config.bits != "auto":
        if config.quantize not in MIXED:
            raise UsageError(
                f"bits={config.bits} is for {TIERS} or {LAYERS}: add quantize='{TIERS}' (--quantize {TIERS})"
            )
        if isinstance(config.bits, str) or not config.bits > 0:
            raise UsageError(f"bits is {config.bits!r}: auto, or bits per weight of the FFs, such as 3.5")
    mixed = config.quantize
    if mixed in MIXED and config.density != "auto":
        raise UsageError(
            f"a density is of one format, and {mixed} are of several: give bits (--bits) in place of a density"
        )
    if mixed in MIXED and config.exact:
        raise UsageError(f"exact mode drafts in one format, not in {mixed}: leave out quantize='{mixed}'")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}: choose one of {', '.join(map(str, allowed))}")


def _at_least_one(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: at least 1")


def check_refresh(refresh: Refresh, exact: bool) -> None:
    """Raise UsageError unless `refresh` is "turn", "never" or a number of tokens, which exact mode has no use for."""
    if isinstance(refresh, str):
        if refresh not in ("turn", "never"):
            raise UsageError(f"refresh is {refresh!r}: choose turn, never or a number of tokens")
    elif refresh < 1:
        raise UsageError(f"refresh is {refresh}: turn, never, or a number of tokens from 1 on")
    elif exact:
        raise UsageError(f"refresh={refresh} with exact mode: every verifying pass refreshes already, leave it out")


def check_density(density: Density | str) -> None:
    """Raise UsageError unless `density` is "auto", a number in [0, 1] or a sequence of such numbers."""
    if isinstance(density, str):
        if density != "auto":
            raise UsageError(f"density is {density!r}: give a number from 0 to 1, one per layer, or auto")
        return
    for value in (density,) if isinstance(density, float | int) else density:
        if not 0.0 <= value <= 1.0:
            raise UsageError(f"density is {value}: it is the fraction of neurons kept, from 0 to 1")


def pass_tokens(exact: bool, draft_tokens: int | None, refresh: Refresh) -> int:
    """Tokens of the streamed passes between two tokens of an answer; 0: there are none."""
    if exact:
        return 1 + (draft_tokens or AUTO_DRAFT_TOKENS)
    return refresh if isinstance(refresh, int) else 0
