"""Exact mode on a model larger than memory: seconds and bytes per token at a given acceptance, beside a forecast.

    python benchmarks/exact_streaming.py --dir INT8_COPY --rival-dir ORIGINAL --cap 12GiB --out OUT

Random weights accept nothing meaningful, so acceptance is simulated: every draft is accepted with the probability of
the schedule, whatever the full model says; drafting, streaming, verifying and choosing anew are real. The forecast is
(1 - a^(N+1)) / (1 - a) tokens in T_pass + N * t_draft, from a pass and a draft that are timed beforehand in the same
process. Cold, in a memory cgroup; the rival streams all weights of the 16-bit original for every token. Last line JSON.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from capped_run import run_capped
from disk import checkpoint_files, drop_page_cache
from model_bytes import parse_bytes
from report import gigabytes, markdown_table, origin_lines, provenance, seconds, write
from sides import Side, Workload, environment, run_side
from transformers import AutoConfig

SCHEDULES = (0.5, 0.8, 0.95)
FORECAST_TOLERANCE = 0.2
CALIBRATION_TOKENS = 9


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="checkpoint of our side")
    parser.add_argument("--rival-dir", type=Path, help="the 16-bit original; without it our side alone is run")
    parser.add_argument("--rival-share", type=float, default=0.9, help="of the cap, copied into RAM")
    parser.add_argument("--rival-tokens", type=int, default=4)
    parser.add_argument("--cap", default="12GiB")
    parser.add_argument("--overhead", default="0.7GB", help="our interpreter and libraries, beside the budget")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=24, help="per schedule")
    parser.add_argument("--acceptance", type=float, nargs="+", default=SCHEDULES, help="the schedules")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=(4, 8, 16), help="for each schedule")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=3000.0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder for the table and the JSON record")
    args = parser.parse_args(arguments)
    if len(args.acceptance) != len(args.draft_tokens):
        parser.error("as many --draft-tokens as --acceptance")
    return args


def simulate(acceptance: float) -> None:
    """From now on drafts are accepted with this probability."""
    from griffin_offload.engine.speculative import ExactLoop

    draws = random.Random(0)

    def verdict(self: Any, scores: torch.Tensor, draft: int, drafted_from: Any) -> int:
        return draft if draws.random() < acceptance else (draft + 1) % scores.shape[-1]

    ExactLoop._verdict = verdict


def generate(model: Any, ids: torch.Tensor, new_tokens: int, **options: Any) -> dict[str, Any]:
    model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, **options)
    return model.last_report.to_json()


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Load once; a draft is timed without passes, then a pass with each draft length, then every schedule."""
    from griffin_offload import GriffinModel

    torch.set_num_threads(args.threads)
    model = GriffinModel.from_pretrained(
        args.dir,
        device="cpu",
        max_gpu_mem=parse_bytes(args.cap) - parse_bytes(args.overhead),
        density=args.density,
        offload="disk",
        ctx_size=args.prompt_tokens + args.new_tokens,
        prompt_tokens=args.prompt_tokens,
        exact=True,
        keep_prompts=True,
        draft_tokens=max(args.draft_tokens),
    )
    vocabulary = AutoConfig.from_pretrained(args.dir).vocab_size
    ids = torch.randint(3, vocabulary, (1, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
    context = model.new_context()  # the prompt is streamed once
    plain = generate(model, ids, CALIBRATION_TOKENS, exact=False, context=context)
    draft_s = plain["decode_s"] / (CALIBRATION_TOKENS - 1)
    simulate(0.0)
    rounds = []
    for acceptance, drafts in zip(args.acceptance, args.draft_tokens, strict=True):
        timed = generate(model, ids, drafts + 2 if drafts < 3 else 3, draft_tokens=drafts, context=context)
        rounds.append({"acceptance": acceptance, "drafts": drafts, "pass_s": mean_pass_s(timed)})
    for schedule in rounds:
        simulate(schedule["acceptance"])
        schedule["report"] = generate(model, ids, args.new_tokens, draft_tokens=schedule["drafts"], context=context)
    return {"plain": plain, "draft_s": draft_s, "schedules": rounds, "plan": model.plan.to_json()}


def mean_pass_s(report: dict[str, Any]) -> float:
    return float(report["drafting"]["pass_s"] / report["drafting"]["passes"])


def forecast_s(acceptance: float, drafts: int, pass_s: float, draft_s: float) -> float:
    """Seconds per token."""
    tokens = (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
    return (pass_s + drafts * draft_s) / tokens


def measured_s(report: dict[str, Any]) -> float:
    drafting = report["drafting"]
    return float((drafting["draft_s"] + drafting["pass_s"]) / drafting["tokens"])


def realised(report: dict[str, Any]) -> float:
    """The acceptance that the draws came to: of so few, it is not the schedule's."""
    drafting = report["drafting"]
    return float(sum(drafting["accepted_by_position"]) / max(sum(drafting["judged_by_position"]), 1))


def run_ours(args: argparse.Namespace, arguments: Sequence[str]) -> tuple[dict[str, Any], Any]:
    drop_page_cache(checkpoint_files(args.dir))
    command = [sys.executable, str(Path(__file__)), *arguments, "--worker"]
    outcome = run_capped(command, parse_bytes(args.cap), args.timeout, environment(args.threads))
    if outcome.returncode != 0:
        raise SystemExit(f"our side failed with {outcome.returncode}")
    return json.loads(outcome.stdout.splitlines()[-1]), outcome


def run_rival(args: argparse.Namespace) -> float:
    """Median seconds per token."""
    cap_bytes = parse_bytes(args.cap)
    with tempfile.TemporaryDirectory() as folder:
        share = ("--ram-share", str(int(args.rival_share * cap_bytes)), "--copy-share", "--offload-folder", folder)
        side = Side("accelerate disk offload", "accelerate", args.threads, args.rival_tokens, share)
        return run_side(side, Workload(args.rival_dir, args.prompt_tokens, cap_bytes, args.timeout)).token_s


def rows(ours: dict[str, Any], rival_s: float | None) -> list[list[str]]:
    found = []
    for schedule in ours["schedules"]:
        report, drafts = schedule["report"], schedule["drafts"]
        share = realised(report)
        expected = forecast_s(share, drafts, schedule["pass_s"], ours["draft_s"])
        token_s = measured_s(report)
        found.append(
            [
                f"{schedule['acceptance']:.0%} ({share:.0%})",
                str(drafts),
                f"{report['drafting']['tokens'] / report['drafting']['passes']:.2f}",
                gigabytes(report["decode_streamed_bytes"] / report["drafting"]["tokens"]),
                seconds(token_s),
                f"{seconds(expected)} ({token_s / expected - 1:+.0%})",
                f"{rival_s / token_s:.1f}x" if rival_s else "",
            ]
        )
    return found


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    if args.worker:
        print(json.dumps(work(args), default=str))
        return 0
    ours, outcome = run_ours(args, arguments)
    rival_s = run_rival(args) if args.rival_dir else None
    record = provenance("exact_streaming.py", arguments) | {
        "ours": ours,
        "rival_token_s": rival_s,
        "rss_anon_peak_bytes": outcome.rss_anon_peak_bytes,
        "oom_kills": outcome.oom_kills,
    }
    heads = [
        "acceptance (drawn)",
        "drafts",
        "tokens a pass",
        "streamed per token",
        "per token",
        "forecast",
        "rival / ours",
    ]
    plain_s, passes = ours["draft_s"], [seconds(schedule["pass_s"]) for schedule in ours["schedules"]]
    text = "\n".join(
        [
            f"# Exact mode by streaming: {args.dir.name}, cap {args.cap}",
            "",
            origin_lines(record),
            "",
            markdown_table([heads, *rows(ours, rival_s)]),
            "",
            f"A draft takes {seconds(plain_s)}, a pass by draft length {', '.join(passes)}; the rival "
            f"{seconds(rival_s)} per token. Peak anonymous memory {gigabytes(outcome.rss_anon_peak_bytes)}.",
        ]
    )
    print(text)
    if args.out is not None:
        write(args.out, f"exact_streaming-{args.dir.name}-{args.cap}", text, record)
    print(json.dumps(record))
    kept = all(
        abs(measured_s(s["report"]) / forecast_s(realised(s["report"]), s["drafts"], s["pass_s"], plain_s) - 1)
        <= FORECAST_TOLERANCE
        for s in ours["schedules"]
    )
    return 0 if kept and not outcome.oom_kills else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
