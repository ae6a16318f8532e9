"""`GriffinModel`: a stock transformers model whose prompts are streamed and whose decoding is resident."""

import functools
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from griffin_offload.checkpoint.registry import locate
from griffin_offload.config import MOST_TOGETHER, LoadConfig
from griffin_offload.devices.memory import OutOfMemoryAsError, beside_bytes, give_back_freed, peak_host_bytes
from griffin_offload.devices.threads import limited_threads, own_modes
from griffin_offload.engine.arguments import empty_context, prepared
from griffin_offload.engine.chat import ChatSession
from griffin_offload.engine.decoding import GeneratedAnswer, answers
from griffin_offload.engine.generation import GenerationMode, GenerationState, ends_of, probabilities_named
from griffin_offload.engine.layer_pass import Progress
from griffin_offload.engine.load import load
from griffin_offload.engine.model_interface import StockInterface, check_wait
from griffin_offload.engine.options import checked_arguments, checked_prompt, translated
from griffin_offload.engine.report import PrefillReport, RunReport
from griffin_offload.engine.residents import Loaded
from griffin_offload.engine.runner import ModelRunner
from griffin_offload.engine.scheduler import SequenceScheduler
from griffin_offload.engine.spec import ModelSpec, check_no_passes, examine, plan_for
from griffin_offload.engine.structure import Structure, StructureGuide
from griffin_offload.errors import BudgetExceeded, UsageError
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.kv_cache.sequence_file import load_context, save_context
from griffin_offload.planner.plan import Plan
from griffin_offload.transformers_api import StockModel, Tokenizer


class GriffinModel(StockInterface):
    """A loaded model. `model` is the stock transformers one and stays usable by itself, in `pipeline` for example:
    a forward with an empty KV cache is the streamed pass, one with a filled cache is resident. Where transformers wants
    a model, this object can be given as well (`StockInterface`).

    Whoever keeps one of the two keeps what it needs; when the last one goes, so does the memory. Calls of several
    threads are answered one after the other, in their order.

    Make one with `from_pretrained`.
    """

    def __init__(self, model_spec: ModelSpec, plan: Plan, loaded: Loaded, load_s: float) -> None:
        self.plan = plan
        self.device, self.hardware = model_spec.device, model_spec.hardware
        self.directory: Path = model_spec.checkpoint.directory
        self.last_report: RunReport | None = None
        """Figures of the last `generate`."""
        self._model_spec, self._loaded, self._load_s = model_spec, loaded, load_s
        self._engine = ModelRunner(model_spec, plan, loaded)
        self._held = loaded.hand_over()
        weakref.finalize(self._held, loaded.close)
        self.__class__ = _named_as(type(self), self._held)

    @classmethod
    def from_pretrained(cls, model: str | Path | None = None, **options: Any) -> "GriffinModel":
        """Plan and load a causal language model from a directory or hub id.

        `options` are the fields of `LoadConfig`: max_gpu_mem, max_cpu_mem, device, density, quantize, dtype, offload,
        ctx_size, prompt_tokens, kv_bits, batch_size, selection, batch_statistic, seed, exact, draft_tokens, refresh,
        decay, keep_prompts, session_mem, ff_chunk_tokens, threads, cuda_graphs, offline, adapter, always_stream. Words
        of transformers' `from_pretrained` (torch_dtype, device_map, revision, token ...) are taken, or refused with the
        option that does it here: `loading_words`. Raises UsageError, DoesNotFit or ModelError before any weight is
        read, where that is possible.
        """
        start = time.perf_counter()
        model = options.pop("pretrained_model_name_or_path", model) or ""  # as transformers calls it
        words = translated(options)
        config = LoadConfig(**words.options)
        if words.hub:
            model = locate(model, offline=config.offline, **words.hub)
        with own_modes(torch.device("cpu")):
            model_spec = examine(model, config)
            plan = plan_for(model_spec)
            remedy = "close other programs or lower --max-gpu-mem"
            refusals = OutOfMemoryAsError("loading", remedy, model_spec.hardware, plan.budget_bytes)
            with refusals, own_modes(model_spec.device):
                return cls(model_spec, plan, load(model_spec, plan, config), time.perf_counter() - start)

    def __repr__(self) -> str:
        plan = self.plan
        return f"GriffinModel({type(self).__name__}, {plan.precision}, density {plan.density:.2g}, on {self.device})"

    @property
    def model(self) -> StockModel:
        """The stock transformers model, with all its residents."""
        if self._loaded.layers.arrival is not None and not self._engine.closed:
            self._loaded.layers.arrival.wait()
        return self._held

    @property
    def _stock(self) -> StockModel:
        return self._held

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, loaded when it is asked for first, unless one was set before; CheckpointError if
        there is none that can be loaded."""
        return self._model_spec.checkpoint.own_tokenizer

    @property
    def engine(self) -> ModelRunner:
        """What forwards go through: for measurements, which need more than `generate`."""
        return self._engine

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and logits of a token."""
        return self._engine.shape.vocab_size

    @property
    def last_prefill(self) -> PrefillReport | None:
        """Figures of the last prompt's streamed pass, whoever caused it."""
        return self._engine.passes.last

    @property
    def progress(self) -> Progress | None:
        """Called with (layers done, layers in all) while a prompt streams."""
        return self._engine.passes.progress

    @progress.setter
    def progress(self, progress: Progress | None) -> None:
        self._engine.passes.progress = progress

    @property
    def selected(self) -> dict[int, Tensor]:
        """Sorted indices [K] of the neurons that are resident, for each streamed layer."""
        return dict(self._loaded.layers.selected)

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights on the device while decoding."""
        return self._loaded.resident_bytes

    @property
    def offload(self) -> str:
        """Where the full FF weights rest: "ram" or "disk"."""
        return self._loaded.offload

    @property
    def wait_s(self) -> float | None:
        """Seconds that a call waits for those of other threads, which come first; None, as it is at first: as long as
        these take. `Busy` when the time is up."""
        return self._engine.wait_s

    @wait_s.setter
    def wait_s(self, wait_s: float | None) -> None:
        check_wait(wait_s)
        self._engine.wait_s = wait_s

    def close(self) -> None:
        """Give back memory and files now, whoever still keeps this object or the stock model: both refuse to be called
        from then on. A call of another thread ends first. Without it, the same happens when nobody keeps either."""
        self._engine.close()
        give_back_freed()
        self.hardware.empty_cache()
        self.hardware.uncap()  # the cap is the process's, not ours

    def __enter__(self) -> "GriffinModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_context(self, tokens: int | None = None) -> Context:
        """An empty context for `generate`, with a KV cache for so many `tokens` at first, or for `plan.context_tokens`.
        UsageError where layers keep a state that cannot be taken back, see `keeps_contexts`."""
        return empty_context(self._engine, tokens)

    @property
    def keeps_contexts(self) -> bool:
        """Whether prompts can be gone on from: not where layers keep a state (of convolutions, of recurrences) that
        cannot be rolled back."""
        return self._model_spec.request.cache == "ours"

    def chat_session(self, **options: Any) -> ChatSession:
        """A conversation; see `ChatSession` for the options."""
        return ChatSession(self, **options)

    def save_context(self, context: Context, path: str | Path, notes: dict[str, object] | None = None) -> None:
        """Write what `context` remembers to a file, and `notes` (JSON values) beside it. SavedContextError if that
        cannot be done; a file that was there stays as it was then."""
        self._check_owner(context)
        save_context(context, Path(path), self._engine.identity, notes or {})

    def load_context(self, path: str | Path, context: Context | None = None) -> tuple[Context, dict[str, Any]]:
        """A context, or `context` made the one, that was saved with this model, precision and density; and its notes.
        No weight is read. SavedContextError, and `context` as it was, if the file cannot be used."""
        context = self.new_context() if context is None else context
        self._check_owner(context)
        engine = self._engine
        with own_modes(self.device):
            return context, load_context(context, Path(path), engine.identity, engine.like, self.device)

    def _check_owner(self, context: Context) -> None:
        if not context.belongs_to(self._loaded):
            raise UsageError("this context belongs to another model: make one with new_context()")

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        exact: bool | None = None,
        draft_tokens: int | None = None,
        refresh: object = None,
        lookup: bool | None = None,
        context: Context | None = None,
        prompt_done: Callable[[Context], None] | None = None,
        structure: Structure | None = None,
        wait_s: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` on the stock model, with its arguments and its result.

        The prompt is streamed once; every further token is computed from residents. Without any length, up to
        `RunConfig.max_new_tokens` are generated. `exact`, `draft_tokens`, `refresh` and `lookup` are as in
        `LoadConfig`, and those of loading by default. With a `context` the prompt [1, T] goes on from what that
        remembers: tokens at its start that the context knows are not computed again. `prompt_done` is called with it
        when the prompt has passed. `past_key_values` of an earlier call (`cache` since transformers 5.24; both names
        are taken) goes on, too, with the neurons that were chosen then. With a `structure` tokens that it does not
        allow are never chosen; the report says whether the answer was complete when it ended.
        `wait_s` is as the attribute, for this call alone. Raises Busy when that is over, UsageError for a prompt that
        is empty or too long for `plan.context_tokens`, DoesNotFit when the batch or its length needs more than the
        budget.
        """
        inputs = next((kwargs.pop(k) for k in ("inputs", "input_ids") if k in kwargs), inputs)
        given = inputs if inputs is not None else kwargs.get("inputs_embeds")
        prompt = checked_prompt(given, self.vocab_size)
        kwargs = checked_arguments(kwargs, prompt)
        kwargs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        if self.generation_config.stop_strings and "stop_strings" not in kwargs:
            kwargs.setdefault("tokenizer", self.tokenizer)  # of the checkpoint's settings
        check_wait(wait_s)
        wait_s = self.wait_s if wait_s is None else wait_s
        with self._engine.alone(wait_s=wait_s), self._engine.guarded():
            mode = self._mode(exact, draft_tokens, refresh, lookup)
            output, report = self._answer(inputs, prompt, kwargs, mode, context, prompt_done, structure)
            self.last_report = report
        for broken in report.broken_promises(beside_bytes(self.hardware, self.plan.full_bytes)):
            warnings.warn(broken, BudgetExceeded, stacklevel=2)
        return output

    def _answer(
        self,
        inputs: Tensor | None,
        prompt: Tensor,
        kwargs: dict[str, object],
        mode: GenerationMode,
        context: Context | None,
        prompt_done: Callable[[Context], None] | None,
        structure: Structure | None,
    ) -> tuple[Any, RunReport]:
        """All of `generate` that holds memory: an error that is raised outside keeps none of it."""
        if context is not None:
            self._check_owner(context)
        guide = self.guide(structure, kwargs)
        kwargs = kwargs if guide is None else guide.among(kwargs)
        run, kwargs = prepared(self._engine, prompt, kwargs, mode, context, guide)
        if context is not None:
            run.ready, run.prompt_done = context.start(prompt[0], exact=mode.exact), prompt_done
            run.cached_tokens = len(context.tokens)
        return self._generate(run, prompt, inputs, kwargs)

    def guide(self, structure: Structure | None, arguments: dict[str, object]) -> StructureGuide | None:
        """What keeps an answer with these `arguments` of `generate` to `structure`; None without one."""
        if structure is None:
            return None
        ends = ends_of(arguments.get("generation_config") or self.generation_config, arguments)
        return StructureGuide(structure, self.tokenizer, self.vocab_size, ends)

    def generate_many(
        self, prompts: Iterable[Tensor | tuple[Tensor, dict[str, object]]], *, most: int = MOST_TOGETHER, **kwargs: Any
    ) -> Iterator[GeneratedAnswer]:
        """Answers to `prompts`, ids [1, T] each, in the order in which they end; up to `most` are computed together.

        A prompt may come with arguments of `generate` of its own, as a pair; `kwargs` are those of all: those for one
        sequence, and `seed`, by which an answer draws whatever its neighbours do. Prompts are taken when there is room,
        and pass between two tokens of the others, together where they may. All that are decoded choose the neurons:
        with fewer than all, answers depend on their neighbours, and `activation_kept` is of an answer's own. Exact
        mode, refresh, some architectures (`why_alone`): one by one. Others have the model between two answers.
        """
        given = (prompt if isinstance(prompt, tuple) else (prompt, {}) for prompt in prompts)
        return answers(self, self.scheduler(most), ((prompt, kwargs | own) for prompt, own in given))

    def scheduler(self, most: int = MOST_TOGETHER) -> SequenceScheduler:
        """What decodes up to `most` sequences together."""
        if most < 1:
            raise UsageError(f"most is {most}: at least one sequence is decoded")
        return SequenceScheduler(self._engine, self._report, most)

    @property
    def shares_neurons(self) -> bool:
        """Whether sequences decoded together share a choice of neurons, and so change each other's answers: not where
        all are resident, nor where an expert that is not is read, or computed by the CPU."""
        layers = self._loaded.layers
        chooses = any(max(counts) < layers.blocks[index].neurons for index, counts in enumerate(layers.counts))
        return chooses and not (self.plan.experts is not None and layers.config.missing_experts != "route")

    @property
    def why_alone(self) -> str | None:
        """Why sequences are computed one by one; None if several can be at once, as far as is known before two met."""
        return self._engine.joint.why_alone

    def _mode(self, exact: bool | None, draft_tokens: int | None, refresh: Any, lookup: bool | None) -> GenerationMode:
        config = self._loaded.layers.config
        mode = GenerationMode(
            exact=config.exact if exact is None else exact,
            draft_tokens=config.draft_tokens if draft_tokens is None and exact is not False else draft_tokens,
            refresh=config.refresh if refresh is None else refresh,
            lookup=config.lookup if lookup is None else lookup,
        )
        if self.plan.experts and not mode.exact and config.missing_experts != "route":
            check_no_passes(mode.pass_tokens, config.missing_experts)
        if mode.exact:
            self._model_spec.check_exact(self._engine.shape.precision, self.plan.kv_bits)
        return mode

    def _generate(
        self, run: GenerationState, prompt: Tensor, inputs: Tensor | None, kwargs: dict[str, object]
    ) -> tuple[Any, RunReport]:
        self.last_report = None
        completed = False
        try:
            self._engine.run = run
            self._loaded.layers.restrict(drafting=run.mode.exact)
            with self._loaded.ledger.measuring(), limited_threads(self._loaded.threads):
                start = time.perf_counter()
                with probabilities_named(self._model_spec.dtype):
                    output = self._held.generate(None if inputs is None else inputs.to(self.device), **kwargs)
                self.hardware.synchronize()
                run.end_check(self._model_spec.dtype)
                sequences = output if isinstance(output, Tensor) else output.sequences
                offset = prompt.shape[1] if inputs is not None else 0
                if run.guide is not None:
                    run.guide.complete(sequences[:, offset:].tolist())
                report = self._report(run, sequences.shape[1] - offset, time.perf_counter() - start)
                completed = True
        finally:
            self._engine.run = None
            if run.guide is not None:
                run.guide.close()
            self._loaded.layers.restrict()
            if completed:
                self._engine.passes.note_chosen(run.cache)  # streamed passes between tokens choose anew
            if run.context is not None:
                run.context.finish(sequences[0].tolist() if completed else None)
                self._engine.forget_mixed(run.context, run.prompt_tokens)
        return output, report

    def _report(self, run: GenerationState, generated_tokens: int, total_s: float) -> RunReport:
        prefill, ledger, layers = run.prefill, self._loaded.ledger, self._loaded.layers
        if prefill is None:
            raise UsageError("custom_generate has not called the model: call the function itself")
        ctx_tokens = run.prompt_tokens + generated_tokens
        use = replace(run.use, batch=run.batch, ctx_tokens=ctx_tokens, logit_positions=1, kept_scores=0)
        self._engine.hold(use, 1, run.cache)
        return RunReport(
            prompt_tokens=prefill.prompt_tokens * run.prompts // run.batch,  # beams repeat each prompt
            cached_prompt_tokens=run.cached_tokens,
            generated_tokens=generated_tokens,
            load_s=self._load_s,
            decode_s=max(total_s - prefill.seconds, 0.0),
            decode_streamed_bytes=layers.fetched_bytes - run.fetched_bytes,
            decode_embedding_bytes=self._engine.embedding_bytes - run.embedding_bytes,
            resident_bytes=self.resident_bytes,
            peak_device_bytes=ledger.peak_bytes,
            peak_host_bytes=peak_host_bytes(),
            host_growth_bytes=ledger.host_growth_bytes,
            experts=layers.expert_report.since(run.experts) if layers.experts else None,
            drafting=run.loop.report if run.loop is not None else None,
            lookup=run.loop.looked_up if run.loop is not None else None,
            **run.graphs.run_figures(captured=self._engine.graphs is not None),
            structure=run.guide.report if run.guide is not None else None,
            **self.plan.run_figures(),
            **prefill.run_figures(),
        )


@functools.cache
def _named(base: type, name: str) -> type:
    return type(name, (base,), {"__module__": base.__module__, "__doc__": base.__doc__})


def _named_as(base: type, stock: StockModel) -> type:
    """A class like `base` with the name of the stock model's: pipelines ask the name whether they know what to do with
    a model, and write an error where they do not."""
    return _named(base, type(stock).__name__)
