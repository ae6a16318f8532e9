"""`GriffinModel`: a stock transformers model whose prompts are streamed and whose decoding is resident."""

import contextlib
import copy
import functools
import inspect
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from griffin_offload.config import LoadConfig, RunConfig
from griffin_offload.errors import BudgetExceeded, DoesNotFit, GriffinError, UsageError, one_line
from griffin_offload.plan import as_loaded, describe_shortfall, replan_for
from griffin_offload.pricing import Plan, Usage, logits_bytes, workspace_bytes
from griffin_offload.runtime.cache import KVCache
from griffin_offload.runtime.load import Loaded, load
from griffin_offload.runtime.memory import HOST_OVERHEAD_BYTES, peak_host_bytes
from griffin_offload.runtime.prefill import Progress, StreamedPass
from griffin_offload.runtime.prospect import Prospect, examine, plan_for
from griffin_offload.runtime.report import PrefillReport, RunReport, planned_figures
from griffin_offload.runtime.run import (
    Run,
    cache_bytes,
    cache_of,
    check_length,
    prompt_mask,
    refuse_what_cannot_work,
    tokens_of,
    usage_of,
)
from griffin_offload.runtime.threads import limited_threads

_LIMITS = ("max_new_tokens", "max_length")
# From here on the process's growth is a figure of the model and no longer of the interpreter.
_LARGE_MODEL_BYTES = 10**9


class GriffinModel:
    """A loaded model. `model` is the stock transformers one and stays usable by itself, in `pipeline` for example:
    a forward with an empty KV cache is the streamed pass, one with a filled cache is resident.

    Make one with `from_pretrained`.
    """

    def __init__(self, prospect: Prospect, plan: Plan, loaded: Loaded, load_s: float) -> None:
        self.model = loaded.model
        self.plan = plan
        self.device = prospect.device
        self.directory: Path = prospect.checkpoint.directory
        self.last_report: RunReport | None = None
        """Figures of the last `generate`."""
        self.last_prefill: PrefillReport | None = None
        """Figures of the last streamed pass, whoever caused it."""
        self.progress: Progress | None = None
        """Called with (layers done, layers in all) while a prompt streams."""
        self._prospect, self._loaded, self._load_s = prospect, loaded, load_s
        self._shape = prospect.shape_of(plan)
        self._run: Run | None = None
        self._stock_forward: Callable[..., Any] = self.model.forward
        self._signature = inspect.signature(self._stock_forward)
        self.model.forward = self._wrapped_forward()
        source = loaded.layers.source
        self._finalize = weakref.finalize(self, source.close if source is not None else int)
        self._user: dict[str, object] = {}
        self._closed = False

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Any) -> "GriffinModel":
        """Plan and load a causal language model from a directory or hub id.

        `options` are the fields of `LoadConfig`: max_gpu_mem, max_cpu_mem, device, density, quantize, dtype, offload,
        ctx_size, prompt_tokens, kv_bits, batch_size, selection, batch_statistic, seed, ff_chunk_tokens, threads,
        offline, always_stream.
        Raises UsageError, DoesNotFit or ModelError before any weight is read, where that is possible.
        """
        start = time.perf_counter()
        known = LoadConfig.__dataclass_fields__
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise UsageError(f"unknown option {unknown[0]!r}: known are {', '.join(known)}")
        config = LoadConfig(**options)
        prospect = examine(model, config)
        plan = plan_for(prospect)
        return cls(prospect, plan, load(prospect, plan, config), time.perf_counter() - start)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return AutoTokenizer.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)

    @property
    def selected(self) -> dict[int, Tensor]:
        """Sorted indices [K] of the neurons the last prompt chose, for each streamed layer."""
        return dict(self._loaded.layers.selected)

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights on the device while decoding."""
        return self._loaded.resident_bytes

    @property
    def offload(self) -> str:
        """Where the full FF weights rest: "ram" or "disk"."""
        return self._loaded.offload

    def close(self) -> None:
        """Give back files and pinned memory, and the stock model its own forward. Without it, all that waits for the
        garbage collector, because the model's forward refers to this object."""
        self._closed = True
        self.model.__dict__.pop("forward", None)
        self._finalize()
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)  # the cap is the process's, not ours

    def __enter__(self) -> "GriffinModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' `generate` on the stock model, with its arguments and its result.

        The prompt is streamed once; every further token is computed from residents. Without any length, up to
        `RunConfig.max_new_tokens` are generated. Raises UsageError for a prompt that is empty or too long for
        `plan.context_tokens`, DoesNotFit when the batch or its length needs more than the budget.
        """
        inputs = next((kwargs.pop(k) for k in ("inputs", "input_ids") if k in kwargs), inputs)
        prompt = inputs if inputs is not None else kwargs.get("inputs_embeds")
        if prompt is None or prompt.dim() < 2 or prompt.shape[1] == 0:
            raise UsageError("the prompt is empty: give at least one token, as a tensor of [batch, tokens]")
        kwargs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        settings = self._settings(prompt, kwargs)
        with self._alone():
            output, report = self._generate(prompt, inputs, kwargs | settings)
        self.last_report = report
        large = self.device.type == "cpu" and self.plan.full_bytes > _LARGE_MODEL_BYTES
        for broken in report.broken_promises(HOST_OVERHEAD_BYTES if large else None):
            warnings.warn(broken, BudgetExceeded, stacklevel=2)
        return output

    def _generate(self, prompt: Tensor, inputs: Tensor | None, kwargs: dict[str, Any]) -> tuple[Any, RunReport]:
        self.last_report = None
        try:
            self._run = run = Run(prompt.shape[0], prompt.shape[1], kwargs.get("attention_mask"))
            with self._loaded.ledger.measuring(), limited_threads(self._loaded.threads):
                start = time.perf_counter()
                output = self.model.generate(None if inputs is None else inputs.to(self.device), **kwargs)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                sequences = output if isinstance(output, Tensor) else output.sequences
                offset = prompt.shape[1] if inputs is not None else 0
                report = self._report(run, sequences.shape[1] - offset, time.perf_counter() - start)
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(f"the device ran out of memory: {one_line(error)}") from error
        finally:
            self._run = None
        return output, report

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One prompt at a time. A lock could be left taken by a Ctrl-C between taking it and `try`; an entry of a
        dict, set by one atomic call inside, cannot."""
        me = object()
        try:
            if self._closed:
                raise GriffinError("this model is closed")
            if self._user.setdefault("now", me) is not me:
                raise GriffinError("this model is generating already")
            yield
        finally:
            if self._user.get("now") is me:
                del self._user["now"]

    def _settings(self, prompt: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ours for transformers' generate, after checking the caller's against the plan."""
        given = kwargs.get("generation_config") or self.model.generation_config
        refuse_what_cannot_work(kwargs, given)
        settings: dict[str, Any] = {"prefill_chunk_size": None}
        if "disable_compile" not in kwargs:
            settings["disable_compile"] = True  # a static cache would compile, anew for every shape
        if all(kwargs.get(name) is None for name in _LIMITS) and all(getattr(given, name) is None for name in _LIMITS):
            room = self.plan.context_tokens - prompt.shape[1]
            settings["max_new_tokens"] = max(min(RunConfig.max_new_tokens, room), 1)
        use = usage_of(prompt, kwargs | settings, (given, self.model.generation_config), self._prospect)
        check_length(use, self.plan.context_tokens)
        self._require(use)
        if use.cache == "ours":
            config, bits = self.model.config, self.plan.kv_bits
            settings["past_key_values"] = KVCache(config, ctx_tokens=use.cache_tokens, bits=bits)
        if kwargs.get("generation_config") is not None:
            # transformers wants either a config or arguments; the cache is none of a config's.
            config = copy.deepcopy(given)
            return {**config.update(**settings), "generation_config": config}
        return settings

    def _require(self, use: Usage) -> None:
        """DoesNotFit unless `use` stays within the budget with the residents as they are."""
        plan = replan_for(self._shape, self._prospect.request, self.plan, use)
        if not plan.fits:
            remedy = f"fewer than {use.batch} sequences at once, shorter ones, or a model loaded with more memory"
            raise DoesNotFit(describe_shortfall(plan, remedy))

    def _wrapped_forward(self) -> Callable[..., Any]:
        @functools.wraps(self._stock_forward)  # generate reads its signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        return forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward: prefill or decode is decided on the host, never by reading a device tensor."""
        run = self._run
        if run is not None and run.prefilled:
            output = self._stock_forward(*args, **kwargs)
            run.cache = cache_of(output, kwargs)
            return output
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        cache = arguments.get("past_key_values")
        if run is None and cache is not None and cache.get_seq_length() > 0:
            if self.last_prefill is None and self.plan.streamed:
                raise GriffinError("the KV cache is filled but no neurons are chosen: no prompt was streamed")
            return self._stock_forward(*args, **kwargs)
        if run is not None:
            return self._prefill(run, arguments, args, kwargs)
        return self._bare_prefill(arguments, args, kwargs)

    def _bare_prefill(self, arguments: dict[str, Any], args: Any, kwargs: Any) -> Any:
        """A forward that nobody announced: checked against the budget first."""
        tokens = tokens_of(arguments)
        keep = arguments.get("logits_to_keep", 0)
        positions = keep if isinstance(keep, int) and keep > 0 else tokens.shape[1]
        self._require(Usage(tokens.shape[0], tokens.shape[1], tokens.shape[1], "dynamic", logit_positions=positions))
        with self._alone(), limited_threads(self._loaded.threads):
            return self._prefill(None, arguments, args, kwargs)

    def _prefill(self, run: "Run | None", arguments: dict[str, Any], args: Any, kwargs: Any) -> Any:
        tokens = tokens_of(arguments)
        given = run.mask if run is not None and run.mask is not None else arguments.get("attention_mask")
        mask = prompt_mask(tokens, given, run.prompt_tokens if run is not None else None)
        self.last_prefill = None  # until this prompt has chosen its neurons, none are
        with StreamedPass(self._loaded.layers, mask, progress=self.progress) as streamed:
            output = self._stock_forward(*args, **kwargs)
        if streamed.unvisited:
            raise GriffinError(f"the forward left out {streamed.unvisited} layers: no neurons are chosen for them")
        self.last_prefill = streamed.report()
        if run is not None:
            use = Usage(tokens.shape[0], tokens.shape[1], tokens.shape[1])
            run.cache = cache_of(output, arguments)
            self._loaded.ledger.hold(
                kv_cache=cache_bytes(run.cache),
                slots=streamed.peak_in_flight_bytes,
                **self._activations(use, tokens.shape[1]),
            )
            self._loaded.ledger.hold(slots=0)
            run.prefilled, run.batch = True, tokens.shape[0]
            run.fetched_bytes, run.embedding_bytes = self._loaded.layers.fetched_bytes, self._embedding_bytes
        return output

    def _activations(self, use: Usage, new_tokens: int) -> dict[str, int]:
        """Workspace and logits as the plan counts them, for the shapes that really passed."""
        request = as_loaded(self._prospect.request, self.plan)
        workspace = workspace_bytes(self._shape, request, use, new_tokens, self.plan.kept)
        return {"workspace": workspace, "logits": logits_bytes(self._shape, use)}

    @property
    def _embedding_bytes(self) -> int:
        return self._loaded.host_embedding.row_bytes if self._loaded.host_embedding else 0

    def _report(self, run: "Run", generated_tokens: int, total_s: float) -> RunReport:
        prefill, ledger = self.last_prefill, self._loaded.ledger
        assert prefill is not None
        use = Usage(run.batch, run.prompt_tokens, run.prompt_tokens + generated_tokens)
        ledger.hold(kv_cache=cache_bytes(run.cache), **self._activations(use, 1))
        return RunReport(
            prompt_tokens=prefill.prompt_tokens * run.prompts // run.batch,  # beams repeat each prompt
            generated_tokens=generated_tokens,
            load_s=self._load_s,
            decode_s=max(total_s - prefill.seconds, 0.0),
            decode_streamed_bytes=self._loaded.layers.fetched_bytes - run.fetched_bytes,
            decode_embedding_bytes=self._embedding_bytes - run.embedding_bytes,
            resident_bytes=self.resident_bytes,
            peak_device_bytes=ledger.peak_bytes,
            peak_host_bytes=peak_host_bytes(),
            host_growth_bytes=ledger.host_growth_bytes,
            **planned_figures(self.plan),
            **prefill.run_figures(),
        )
