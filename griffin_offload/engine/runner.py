"""The engine: which forwards of a loaded model are streamed and which are resident, and what they hold."""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.states import begin_anew, rope_border, shares_entries
from griffin_offload.devices.base import Recorder
from griffin_offload.devices.memory import OutOfMemoryAsError
from griffin_offload.devices.threads import limited_threads, own_modes
from griffin_offload.engine.decode_graph import DecodeGraphs
from griffin_offload.engine.drafts import StepCosts
from griffin_offload.engine.generation import (
    GenerationState,
    cache_bytes,
    cache_of,
    prompt_mask,
    state_bytes,
    tokens_of,
)
from griffin_offload.engine.joint_step import JointStep
from griffin_offload.engine.model_interface import FifoLock, Guard, hand_out, hollow, one_token_each, stock_forward
from griffin_offload.engine.options import checked_prompt
from griffin_offload.engine.prompt_passes import PromptPasses
from griffin_offload.engine.residents import Loaded
from griffin_offload.engine.spec import ModelSpec, identity_of, like_of, why_no_checkpoint
from griffin_offload.errors import DoesNotFit, GriffinError, UsageError
from griffin_offload.kernels import table
from griffin_offload.kernels.library import HALVES
from griffin_offload.kv_cache.kv_cache import KVCache, ReusedKVCache
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.kv_cache.sequence_file import ContextSchema, ModelIdentity
from griffin_offload.kv_cache.workload import Workload
from griffin_offload.offload.weight_store import MmapStore
from griffin_offload.planner.plan import Plan, as_loaded, describe_shortfall
from griffin_offload.planner.solve import replan_beside
from griffin_offload.planner.workspace import logits_bytes, statistics_bytes, workspace_bytes
from griffin_offload.transformers_api import CACHE, Arguments, StockCache, StockOutput, with_own_name


class ModelRunner:
    """Takes the place of the stock model's forward: one with an empty KV cache is a streamed pass, one with a filled
    cache is resident, and a `GenerationState` says more. Decided on the host, never by reading a device tensor.

    The stock model keeps it alive and not the other way round: `loaded` has a weak reference of that.
    """

    def __init__(self, model_spec: ModelSpec, plan: Plan, loaded: Loaded) -> None:
        self.model_spec, self.plan, self.loaded = model_spec, plan, loaded
        self.shape = model_spec.shape_of(plan)
        self.run: GenerationState | None = None
        self.idle_bytes = 0
        """Of contexts that are kept beside the one in use, see `keep_idle`."""
        self.beside: tuple[Context, ...] = ()
        """Of sequences that are being decoded, beside the one whose turn it is (scheduler.py)."""
        self._passing: tuple[Workload, ...] = ()
        self.wait_s: float | None = None
        """Seconds that calls wait for those of other threads; None: as long as these take."""
        self.stock_forward = stock_forward(loaded.model)
        replays = model_spec.request.replays > 0 and not loaded.layers.experts  # which ask in each layer who is there
        self.joint = JointStep(loaded.model, self.stock_forward, replays=replays)
        self._signature = inspect.signature(self.stock_forward)
        self.passes = PromptPasses(
            loaded.layers,
            model_spec.device,
            chooses=bool(plan.streamed),
            skips_tokens=shares_entries(loaded.model.config),
            state_writers=self.shape.state_writers,
            forward=self.stock_forward,
        )
        # Our kernels for a few rows are of 16 bits, on the CPU; elsewhere drafts are for those who ask.
        own = model_spec.dtype in HALVES and not model_spec.hardware.queues_work
        self.step_costs = StepCosts(alike=None if own else False)
        self.border = rope_border(loaded.model.config, type(loaded.model))
        self.turns, self._closed = FifoLock(), False
        hand_out(loaded.model, self)
        loaded.layers.decoder[0].register_forward_pre_hook(
            Guard(self._check_whole, self.turns, whole=not plan.streamed)
        )
        self.graphs: DecodeGraphs | None = None  # captured decode steps, on a device that has such
        self.kept_cache = ReusedKVCache(loaded.model.config, plan.kv_bits)
        layouts = [layout.name for format in self.shape.formats for layout in format.layouts()]
        table.prepare(layouts, model_spec.device, model_spec.dtype)
        if model_spec.request.graphs:
            self.capture_with(model_spec.hardware.recorder())

    @property
    def blocks(self) -> list[Block]:
        """The FF block of every layer."""
        return self.loaded.layers.blocks

    @property
    def streams_from_disk(self) -> bool:
        """Whether a prompt reads the disk whatever the page cache holds: the model is larger than that."""
        source = self.loaded.layers.source
        return isinstance(source, MmapStore) and bool(source.placements)

    @property
    def decay(self) -> float:
        """What an answer's earlier statistic is multiplied by at each streamed pass between its tokens."""
        return self.loaded.layers.config.decay

    @property
    def closed(self) -> bool:
        return self._closed

    def check_open(self) -> None:
        if self._closed:
            raise GriffinError("this model is closed: load it again")

    @property
    def broken(self) -> bool:
        """Whether residents could not be read, so that only loading again helps."""
        arrival = self.loaded.layers.arrival
        return arrival is not None and arrival.failed

    def close(self) -> None:
        """Give the memory back, whoever keeps the stock model, whose forward is refused from now on. A call of another
        thread ends first."""
        if self._closed:
            return
        with self.alone(wait_s=None):
            self._closed = True
            self.kept_cache.release()
            (self.graphs or self.joint).close()
            self.loaded.close()
            hollow(self.loaded.model)

    @contextlib.contextmanager
    def alone(self, *, wait_s: float | None = -1) -> Iterator[None]:
        """One call at a time, in the order in which they come: Busy after `wait_s` seconds (None: never; below 0: those
        of the engine), GriffinError inside another call of this thread."""
        nested = (
            "this model is generating already, and was called by what runs inside of that (a streamer, a criterion, a "
            "processor, an assistant): call it when that has ended, or load it once more"
        )
        wait_s = self.wait_s if wait_s is not None and wait_s < 0 else wait_s
        with self.turns.turn(nested, wait_s):
            self.check_open()
            with own_modes(self.model_spec.device):
                yield

    def _check_whole(self) -> None:
        """Before the first layer, outside of our own forwards: the layers' neurons are those of some prompt."""
        self.check_open()
        if self.plan.streamed:
            raise UsageError(
                "a part of this model cannot run by itself, its layers hold the neurons of another prompt: call the "
                "whole model (output_hidden_states=True gives what is inside), or load it with density=1.0"
            )

    def why_not_saved(self) -> str | None:
        """Why the stock model's parameters are no checkpoint; None if they are one."""
        return "it is closed" if self._closed else why_no_checkpoint(self.model_spec, self.plan)

    def capture_with(self, recorder: Recorder) -> None:
        """Decode by what `recorder` captures from now on."""
        self.step_costs.alike = False  # one token is a graph, several are none
        on_host = self.loaded.host_embedding is not None
        self.graphs = DecodeGraphs(self.loaded.model, self.stock_forward, recorder, embeds_on_host=on_host)

    def kv_cache(self, use: Workload, *, returned: bool) -> KVCache:
        """An empty KV cache for `use`. Where there are captures it is the last run's, for the whole context if the
        budget allows; not if it is `returned` to the caller, who may keep it."""
        keep = self.graphs is not None and not returned
        tokens = self.roomy_tokens(use) if keep else use.cache_tokens
        return self.kept_cache.take(use.batch, tokens, keep=keep)

    def roomy_tokens(self, use: Workload) -> int:
        """Tokens of a KV cache for `use` and what may follow it: the whole context, if the budget allows."""
        whole = replace(use, ctx_tokens=max(use.ctx_tokens, self.plan.context_tokens))
        return (whole if self._plan_of(whole).fits else use).cache_tokens

    def guarded(self) -> OutOfMemoryAsError:
        """OutOfMemory inside when memory is refused."""
        remedy = "ask for less (a shorter prompt, fewer sequences), or close other programs"
        budget_bytes = self.plan.budget_bytes
        return OutOfMemoryAsError("generating", remedy, self.model_spec.hardware, budget_bytes, self.kept_cache.release)

    def keep_idle(self, idle_bytes: int) -> None:
        """Count so many bytes of contexts that nobody uses at the moment against the budget."""
        self.idle_bytes = idle_bytes
        self.loaded.ledger.hold(sessions=self._other_bytes)

    def decode_beside(self, contexts: Sequence[Context], passing: Sequence[Workload] = ()) -> None:
        """Whose contexts there are beside that of the next run: of sequences whose answers go on; and uses whose
        prompts will pass together with its own."""
        self.beside, self._passing = tuple(contexts), tuple(passing)
        self.loaded.ledger.hold(sessions=self._other_bytes)

    @property
    def _other_bytes(self) -> int:
        return self.idle_bytes + sum(context.nbytes for context in self.beside)

    def require(self, use: Workload) -> None:
        """DoesNotFit unless `use` stays within the budget with the residents and idle contexts as they are."""
        plan = self._plan_of(use)
        if not plan.fits:
            fewer = f"fewer than {use.batch} sequences at once, shorter ones" if use.batch > 1 else "a shorter sequence"
            raise DoesNotFit(describe_shortfall(plan, f"{fewer}, or a model loaded with more memory"))

    def _plan_of(self, use: Workload) -> Plan:
        request = replace(self.model_spec.request, session_bytes=self._other_bytes)
        return replan_beside(self.shape, request, self.plan, use, self._passing, len(self.beside))

    def hold(self, use: Workload, new_tokens: int, cache: StockCache | None, slots: int = 0) -> None:
        """Enter a forward of `new_tokens` into the ledger: activations as the plan counts them, the KV cache and
        slots as they are."""
        request = as_loaded(self.model_spec.request, self.plan)
        slots = max(slots, self.loaded.layers.expert_buffers.nbytes)
        self.loaded.ledger.hold(
            graphs=self.joint.replay_bytes,
            kv_cache=cache_bytes(cache),
            states=state_bytes(cache),
            slots=slots,
            workspace=workspace_bytes(self.shape, request, use, new_tokens, use.ctx_tokens, self.plan.counts),
            logits=logits_bytes(self.shape, use),
            statistic=statistics_bytes(self.shape, request, use, self.plan.counts, self.plan.streamed),
        )
        self.loaded.ledger.hold(slots=0)

    def full_pass(self, inputs: Arguments, *, choose: bool, each: bool) -> tuple[StockOutput, dict[int, Tensor]]:
        """A streamed pass over `inputs` behind the run's context, between two tokens of its answer: (the model's
        output, s^2 [1, G, F] by layer), G being one, or with `each` the tokens."""
        run = self.run
        assert run is not None, "a pass of a run"
        assert run.context is not None, "with a context"
        output, streamed = self.passes.between_tokens(inputs, run.context, choose=choose, each=each)
        self.hold(run.use, tokens_of(inputs).shape[1], run.cache, streamed.peak_in_flight_bytes)
        return output, streamed.sums

    def forward(self, *args: Any, **kwargs: Any) -> StockOutput:
        """What the stock model's forward is: inside a `generate` a part of that, else a call by itself."""
        if self.turns.mine:
            return self._forward(args, kwargs)
        with self.alone():
            return self._forward(args, kwargs)

    def _forward(self, args: Sequence[Any], kwargs: Arguments) -> StockOutput:
        kwargs = with_own_name(kwargs)
        run, again = self.run, False
        if run is not None and self.border is not None and not args and kwargs.get(CACHE) is None:
            # Phi-3's way to have everything computed anew, behind the border of its positions.
            kwargs, again = kwargs | {CACHE: run.own_cache}, True
        if run is not None and run.prefilled:
            output = self._read_again(run, kwargs) if again else self._resident(run, args, kwargs)
            run.cache = cache_of(output, kwargs)
            return self._seen(run, output)
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        given = arguments.get(CACHE)
        if self.border is not None and self.border.moving and (given is None or given.get_seq_length() == 0):
            begin_anew(self.loaded.model)
        if run is not None:
            return self._seen(run, self._first(run, arguments, args, kwargs))
        if not torch.compiler.is_compiling():
            ids = arguments.get("input_ids")
            checked_prompt(arguments.get("inputs_embeds") if ids is None else ids, self.shape.vocab_size)
        if given is not None and given.get_seq_length() > 0:
            self.passes.adopt(given)
            return self.stock_forward(*args, **kwargs)
        return self._bare_prefill(arguments, args, kwargs)

    def _seen(self, run: GenerationState, output: StockOutput) -> StockOutput:
        """`output`, after whoever observes its logits has seen them; drafts' are shown when they are judged."""
        if run.loop is None:
            self.observe(output.logits[:, -1])
        return output

    def observe(self, logits: Tensor) -> None:
        """Show the run's observers the logits [B, V] of its next token, which have to be numbers."""
        if self.run is not None:
            self.run.check_numbers(logits, self.model_spec.dtype, waits=self.model_spec.hardware.queues_work)
            for observer in self.run.observers:
                observer.observe(logits)

    def _resident(self, run: GenerationState, args: Sequence[Any], kwargs: Arguments) -> StockOutput:
        """A forward of the residents: by a captured graph, by a replay, or kernel by kernel."""
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        given = arguments | arguments.pop("kwargs", {})
        output = self.joint.alone(given, run.graphs) if self.graphs is None else self.graphs.forward(given, run.graphs)
        with one_token_each(tokens_of(arguments)):
            return self.stock_forward(*args, **kwargs) if output is None else output

    def _bare_prefill(self, arguments: Arguments, args: Sequence[Any], kwargs: Arguments) -> StockOutput:
        """A forward that nobody announced: checked against the budget first."""
        self.kept_cache.release()
        tokens = tokens_of(arguments)
        keep = arguments.get("logits_to_keep", 0)
        positions = min(keep, tokens.shape[1]) if isinstance(keep, int) and keep > 0 else tokens.shape[1]
        self.require(Workload(tokens.shape[0], tokens.shape[1], tokens.shape[1], "dynamic", logit_positions=positions))
        mask = prompt_mask(tokens, arguments.get("attention_mask"), None)
        with self.guarded(), limited_threads(self.loaded.threads):
            output = self.passes.prefill(mask, None, args, kwargs)[0]
        self.passes.note_chosen(cache_of(output, arguments))
        return output

    def _first(self, run: GenerationState, arguments: Arguments, args: Sequence[Any], kwargs: Arguments) -> StockOutput:
        """A run's first forward: its prompt, or what a context does not know of it."""
        tokens, context = tokens_of(arguments), run.context
        beside = self.beside if run.joint else ()
        if context is not None and run.ready is not None:
            context.cache.restore(tokens.shape[1])
            self.passes.resume(context, 0, beside, joint=run.joint)
            output: StockOutput = CausalLMOutputWithPast(logits=run.ready[:, None], **{CACHE: context.cache})
            slots = 0
        elif context is not None and context.tokens and run.mode.refresh == "never" and not run.mode.exact:
            self.passes.resume(context, tokens.shape[1], beside, joint=run.joint)
            output, slots = self.stock_forward(*args, **kwargs), 0
        elif run.past_tokens:
            output, slots = self.passes.go_on(run, arguments, args, kwargs), 0
        else:
            given = run.mask if run.mask is not None else arguments.get("attention_mask")
            past = context is not None and bool(context.tokens)
            mask = prompt_mask(tokens, *((None, None) if past else (given, run.prompt_tokens)))
            output, streamed = self.passes.prefill(mask, context, args, kwargs, None, beside)
            slots = streamed.peak_in_flight_bytes
        self._passed(run, cache_of(output, arguments), output.logits[:, -1])
        seen = max(run.prompt_tokens, tokens.shape[1])  # prompt lookup appends drafts
        use = replace(run.use, batch=tokens.shape[0], ctx_tokens=seen, logit_positions=1, kept_scores=0)
        self.hold(use, tokens.shape[1], run.cache, slots)
        run.batch = tokens.shape[0]
        return output

    def _passed(self, run: GenerationState, cache: StockCache | None, logits: Tensor) -> None:
        """The prompt of `run` has passed, with these logits [B, V] behind it."""
        (self.graphs or self.joint).begin(run.mask)
        run.cache = cache
        self.passes.note_chosen(cache)
        if run.context is not None:
            self._remember(run.context, run, logits)
            if run.prompt_done is not None:
                run.prompt_done(run.context)
        run.prefilled, run.prefill = True, self.passes.last
        run.fetched_bytes, run.embedding_bytes = self.loaded.layers.fetched_bytes, self.embedding_bytes
        run.experts = self.loaded.layers.expert_report

    def pass_together(self, runs: Sequence[tuple[GenerationState, Context]], prompts: Sequence[Tensor]) -> Tensor:
        """The logits [N, V] behind several prompts, [1, T] each, whose contexts are empty, by one streamed pass."""
        contexts, decoding, (first, *others) = [context for _, context in runs], self.beside, [run for run, _ in runs]
        forward = functools.partial(self.joint.prompts, prompts, [context.cache for context in contexts])
        lengths = [run.prompt_tokens for run, _ in runs]
        logits, streamed = self.passes.prefill_together(contexts, lengths, forward, decoding)
        for (run, context), row, self.passes.last in zip(runs, logits.split(1), streamed.reports(), strict=True):
            self._passed(run, context.cache, row)
        self.decode_beside([*decoding, *contexts[1:]])
        use = replace(first.use, ctx_tokens=sum(lengths)).among([run.use for run in others], len(decoding))
        self.hold(use, sum(lengths), contexts[0].cache, streamed.peak_in_flight_bytes)
        return logits

    def _read_again(self, run: GenerationState, kwargs: Arguments) -> StockOutput:
        """All tokens so far, streamed like a prompt: their positions are turned by other angles from now on."""
        tokens = tokens_of(kwargs)
        if run.own_cache is not None:
            run.own_cache.reset()
        if run.context is not None:
            run.context.begin_again()
        mask = prompt_mask(tokens, kwargs.get("attention_mask"), None)
        output, streamed = self.passes.prefill(mask, run.context, (), kwargs, start=0)
        (self.graphs or self.joint).begin(mask)
        self.hold(run.use, tokens.shape[1], cache_of(output, kwargs), streamed.peak_in_flight_bytes)
        return output

    def forget_mixed(self, context: Context, prompt_tokens: int) -> None:
        """Forget entries of which some were turned by the angles of this side of the border and some by the other's."""
        border = self.border
        if border is not None and not border.rereads and border.crossed(prompt_tokens, len(context.tokens)):
            context.clear()

    def _remember(self, context: Context, run: GenerationState, logits: Tensor) -> None:
        """The prompt has passed; only what the full model computed is a state to go back to."""
        known = len(context.tokens)
        context.tokens = list(run.prompt_ids)
        if run.ready is None and (run.mode.refresh != "never" or known == 0):
            context.mark(logits)

    @functools.cached_property
    def identity(self) -> ModelIdentity:
        """What the numbers in a context depend on."""
        return identity_of(self.model_spec, self.plan, self.loaded.layers.config)

    @property
    def like(self) -> ContextSchema:
        """What the parts of a saved context must look like."""
        return like_of(self.model_spec, self.plan)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of embedding rows that came from the host."""
        return self.loaded.host_embedding.row_bytes if self.loaded.host_embedding else 0
