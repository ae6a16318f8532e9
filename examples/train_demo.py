"""Train, continue or measure the small demo Llama, or a mixture of experts, on local text files.

    python examples/train_demo.py --text stories.txt.xz:60 books.txt:40 \
        --valid stories_valid.txt.xz books_valid.txt --out demo --minutes 60

Texts are UTF-8, `.txt` or `.txt.xz`, documents separated by a line `<|endoftext|>`.
Ends in one JSON line with the held-out loss (nats per token) of each `--valid` file.
B sequences of T tokens make a batch; matrices train with Muon, the rest with AdamW.
"""

import argparse
import copy
import json
import lzma
import shutil
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from torch.nn.functional import cross_entropy

END = "<|endoftext|>"
SIZES = {  # by the names in config.json
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
NUMBERS = (
    ("minutes", 60.0, "wall time of the training"),
    ("checkpoint-minutes", 10.0, "time between checkpoints, each with a held-out loss"),
    ("matrix-rate", 0.02, "peak rate of Muon; half of it to continue a trained model"),
    ("other-rate", 3e-3, "peak rate of AdamW (embeddings and norms); likewise"),
    ("warmup-steps", 100, "steps of linear warm-up"),
    ("tokens-per-sequence", 512, "T"),
    ("batch", 8, "B"),
    ("valid-sequences", 64, "at most this many sequences of each held-out file, 0 for all"),
    ("threads", 1, "CPU threads"),
    ("seed", 0, "seed of the weights and of the windows drawn"),
    ("balance", 0.02, "what unequal use of experts costs"),
    ("differ", 0.0, "what is given for sequences that use other experts than others"),
    ("experts", 0, "split each FF among as many, 2 of which see a token (Mixtral); 0: a Llama"),
    *((name.replace("_", "-"), size, "of a fresh model") for name, size in SIZES.items()),
)


def weighted_file(item: str) -> tuple[str, float]:
    path, _, weight = item.rpartition(":")
    if not path:
        raise argparse.ArgumentTypeError(f"{item}: write FILE:WEIGHT, for example {item}:1")
    return path, float(weight)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--text", nargs="+", type=weighted_file, default=[], metavar="FILE:WEIGHT")
    add("--valid", nargs="+", required=True, metavar="FILE", help="held-out text")
    add("--init", type=Path, help="checkpoint to continue (default: a fresh model)")
    add("--out", type=Path, help="folder to write; OUT.partial is the checkpoint on the way")
    add("--evaluate-only", action="store_true", help="measure --init on --valid and stop")
    add("--device", default="cpu")
    add("--compile", action="store_true", help="compile the step: a minute first, then faster")
    add("--float32", action="store_true", help="no bf16 autocast: faster on a CPU without bf16")
    for name, default, meaning in NUMBERS:
        add(f"--{name}", type=type(default), default=default, help=f"{meaning} ({default})")
    args = parser.parse_args()
    if not (args.init if args.evaluate_only else args.out and args.text):
        parser.error("training needs --out and --text; --evaluate-only needs --init")
    return args


def read_documents(path: str) -> list[str]:
    opener = lzma.open if path.endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [text.strip() for text in file.read().split(END) if text.strip()]


def read_windows(path: str, tokenizer, args, stride: int) -> torch.Tensor:
    """Windows of T + 1 tokens every `stride` tokens of a file, as a view (windows, T + 1)."""
    encoded = tokenizer.backend_tokenizer.encode_batch(read_documents(path))
    ids = [i for document in encoded for i in (tokenizer.eos_token_id, *document.ids)]
    if len(ids) <= args.tokens_per_sequence:
        raise SystemExit(f"{path}: {len(ids)} tokens; --tokens-per-sequence must be below that")
    return torch.tensor(ids).unfold(0, args.tokens_per_sequence + 1, stride)


def train_tokenizer(paths: list[str], vocabulary: int):
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    documents = (document for path in paths for document in read_documents(path))
    tokenizer.train_from_iterator(documents, vocabulary, special_tokens=[END])
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **ends)


def load_or_create(args: argparse.Namespace):
    if args.init:
        # Master weights stay float32: a bf16 weight would round small updates away.
        model = transformers.AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32)
        split = args.experts and model.config.model_type == "llama"
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.init)
        return (split_among_experts(model, args.experts) if split else model), tokenizer
    tokenizer = train_tokenizer([path for path, _ in args.text], args.vocab_size)
    sizes = {name: getattr(args, name) for name in SIZES} | {"vocab_size": len(tokenizer)}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    config = transformers.LlamaConfig(**sizes, **ends, rms_norm_eps=1e-5, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    return (split_among_experts(model, args.experts) if args.experts else model), tokenizer


@torch.no_grad()
def split_among_experts(llama, experts: int):
    """A Mixtral with the same attention, whose experts are equal parts of the Llama's FFs; 2 for each token."""
    shared = ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "head_dim")
    shared += ("bos_token_id", "eos_token_id", "pad_token_id")
    kept = {name: getattr(llama.config, name) for name in (*SIZES, *shared)}
    kept["intermediate_size"] //= experts
    config = transformers.MixtralConfig(**kept, num_local_experts=experts, num_experts_per_tok=2, sliding_window=None)
    model = transformers.MixtralForCausalLM(config)
    model.load_state_dict(llama.state_dict(), strict=False)
    for own, full in zip(model.model.layers, llama.model.layers, strict=True):
        gates, ups = (m.weight.view(experts, -1, m.in_features) for m in (full.mlp.gate_proj, full.mlp.up_proj))
        own.mlp.experts.gate_up_proj.copy_(torch.cat([gates, ups], 1))
        downs = full.mlp.down_proj.weight.view(config.hidden_size, experts, -1).transpose(0, 1)
        own.mlp.experts.down_proj.copy_(2 * downs)  # the weights of a token's two experts sum to 1
    return model


def loss_of(model, windows: torch.Tensor, args) -> torch.Tensor:
    """Mean loss over windows of shape (B, T + 1); in training also the routers'."""
    windows = windows.to(args.device)
    more = {"output_router_logits": True} if model.training and is_mixture(model) else {}
    with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=not args.float32):
        output = model(input_ids=windows[:, :-1], use_cache=False, **more)
    loss = cross_entropy(output.logits.flatten(0, 1).float(), windows[:, 1:].flatten())
    return loss + routing_loss(output.router_logits, len(windows), args) if more else loss


def is_mixture(model) -> bool:
    return hasattr(model.config, "num_local_experts")


def routing_loss(router_logits, sequences: int, args) -> torch.Tensor:
    """What the routers of all layers [B * T, E] are to minimise beside the loss, mean over layers.

    `--balance` weighs E * sum over experts of (share of tokens * mean probability), 1 where all are used alike. Layer
    by layer: transformers' own sums over layers first, and each may then use two experts, as long as they differ.
    `--differ` rewards the mutual information of sequence and expert: that one sequence uses other experts than another.
    """
    costs = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, logits.topk(2, -1).indices, 0.5)
        balance = logits.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum()
        each = probabilities.unflatten(0, (sequences, -1)).mean(1)
        information = (each * (each / each.mean(0)).log()).sum(-1).mean()
        costs.append(args.balance * balance - args.differ * information)
    return torch.stack(costs).mean()


@torch.no_grad()
def held_out_losses(model, valid: dict[str, torch.Tensor], args) -> dict[str, float]:
    losses = {}
    model.eval()
    for name, windows in valid.items():
        count = min(args.valid_sequences or len(windows), len(windows))
        # Spread over the whole file: its books differ more than its pages.
        windows = windows[torch.linspace(0, len(windows) - 1, count).long()]
        total = sum(loss_of(model, w, args).item() * len(w) for w in windows.split(args.batch))
        losses[name] = round(total / count, 4)
    model.train()
    return losses


def draw(texts, generator: torch.Generator, args) -> torch.Tensor:
    """A batch (B, T + 1): each row from a text chosen by weight, at a random place in it."""
    weights = torch.tensor([weight for _, weight in texts])
    chosen = torch.multinomial(weights, args.batch, True, generator=generator)
    windows = (texts[text][0] for text in chosen.tolist())
    return torch.stack([w[torch.randint(len(w), (), generator=generator)] for w in windows])


class ExpertsMuon(torch.optim.Muon):
    """Muon takes matrices: those of experts are views of the tensor of all of them."""

    def __init__(self, parameters: list[torch.nn.Parameter], **settings: float) -> None:
        self.stacked = parameters
        self.views = [[torch.nn.Parameter(matrix) for matrix in p.data] for p in parameters]
        super().__init__([view for views in self.views for view in views], **settings)

    def step(self, closure=None):
        for stacked, views in zip(self.stacked, self.views, strict=True):
            for view, gradient in zip(views, stacked.grad, strict=True):
                view.grad = gradient
        return super().step(closure)


def make_optimizers(model, args) -> list[torch.optim.Optimizer]:
    layers = [p for name, p in model.model.layers.named_parameters() if "mlp.gate.weight" not in name]
    matrices, experts = ([p for p in layers if p.ndim == axes] for axes in (2, 3))
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices + experts)]
    adam = torch.optim.AdamW(others, lr=args.other_rate, betas=(0.9, 0.95), weight_decay=0.0)
    muon = torch.optim.Muon(matrices, lr=args.matrix_rate, weight_decay=0.0)
    more = [ExpertsMuon(experts, lr=args.matrix_rate, weight_decay=0.0)] if experts else []
    return [muon, adam, *more]


def update(model, optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("peak", group["lr"])
        optimizer.step()
    model.zero_grad()


def save(model, tokenizer, out: Path) -> None:
    """Write beside `out` and rename, so that `out` is never a half-written checkpoint."""
    new = out.with_name(f"{out.name}.writing")
    shutil.rmtree(new, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(new)
    tokenizer.save_pretrained(new)
    shutil.rmtree(out, ignore_errors=True)
    new.replace(out)


def train(model, tokenizer, valid, args) -> None:
    """Run until the wall time is up: the rate follows the clock, so `--minutes` is kept."""
    texts = [(read_windows(path, tokenizer, args, 1), weight) for path, weight in args.text]
    optimizers, generator = make_optimizers(model, args), torch.Generator().manual_seed(args.seed)
    step_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    start, length_s, step, gone_s, next_save_s = time.monotonic(), args.minutes * 60, 0, 0.0, 0.0
    while gone_s < length_s:
        if gone_s >= next_save_s:
            next_save_s += args.checkpoint_minutes * 60
            save(model, tokenizer, args.out.with_name(f"{args.out.name}.partial"))
            print(f"{gone_s:6.0f} s, held out: {held_out_losses(model, valid, args)}", flush=True)
        loss = step_loss(model, draw(texts, generator, args), args)
        loss.backward()
        warm_up, decay = (step + 1) / max(1, args.warmup_steps), 2 - 2 * gone_s / length_s
        update(model, optimizers, min(1.0, warm_up) * min(1.0, decay))
        step, gone_s = step + 1, time.monotonic() - start
        if step % 50 == 0:
            speed = f"{step * args.batch * args.tokens_per_sequence / gone_s:.0f} tokens/s"
            print(f"{gone_s:6.0f} s, step {step}: loss {loss.item():.3f}, {speed}", flush=True)
    save(model, tokenizer, args.out)


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model, tokenizer = load_or_create(args)
    model = model.to(args.device)
    valid = {p: read_windows(p, tokenizer, args, args.tokens_per_sequence) for p in args.valid}
    if not args.evaluate_only:
        train(model, tokenizer, valid, args)
    print(json.dumps({"held_out_loss": held_out_losses(model, valid, args)}))


if __name__ == "__main__":
    main()
