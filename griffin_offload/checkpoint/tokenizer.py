"""The tokenizer of a checkpoint, and why there is none: its library tells of files by what it meets in them."""

import array
import contextlib
import json
import os
import re
import select
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from griffin_offload.checkpoint.files import check_content
from griffin_offload.devices.memory import give_back_freed
from griffin_offload.errors import CheckpointError, TemplateError, UsageError, one_line
from griffin_offload.transformers_api import Tokenizer
from griffin_offload.units import format_bytes

# Every kind of tokenizer has a file with such a name.
_PATTERNS = ("*token*", "*vocab*", "*.model", "merges*", "*tekken*", "*.tiktoken", "chat_template*")
_WHOLE = "tokenizer.json"
# What older kinds are read with, by their files' names: packages by what they are imported and installed as.
_READERS = (
    ("*.model", "sentencepiece's", {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}),
    ("*.tiktoken", "tiktoken's", {"tiktoken": "tiktoken"}),
    ("*tekken*", "Mistral's", {"mistral_common": "mistral-common"}),
)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint; CheckpointError if there is none that can be loaded."""
    files = sorted({path for pattern in _PATTERNS for path in directory.glob(pattern) if not os.path.isdir(path)})
    for path in files:
        if path.suffix in (".json", ".jinja", ".txt") or not (directory / _WHOLE).is_file():
            check_content(path)
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        _drop_copies(tokenizer)
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers fail in many ways; a panic of native code is no Exception
        raise CheckpointError(_reason(directory, files, error)) from error


def _drop_copies(tokenizer: Tokenizer) -> None:
    """Forget the tables of words and merges that transformers keeps as Python objects beside the native tokenizer's
    own: 0.15 GB for 262,144 words, of which nothing makes use once that has been built."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        for name in ("_vocab", "_merges"):
            vars(tokenizer).pop(name, None)


def _reason(directory: Path, files: list[Path], error: BaseException) -> str:
    if not files:
        return (
            f"{directory} has no tokenizer files: copy tokenizer.json or the like beside its config.json, or use the "
            "Python API with token ids, or set model.tokenizer"
        )
    damaged = [found for found in map(_damage, files) if found is not None]
    if damaged:
        return damaged[0]
    for pattern, whose, packages in _READERS:
        found = [path.name for path in files if path.match(pattern)]
        lacking = [name for module, name in packages.items() if not _installed(module)]
        if found and lacking and not (directory / _WHOLE).is_file():
            return (
                f"{directory} has no {_WHOLE}, only {found[0]}, which is read with {whose} packages: pip install "
                f"{' '.join(lacking)}"
            )
    return (
        f"{directory} has no tokenizer that can be loaded (from {', '.join(p.name for p in files)}): {one_line(error)}"
    )


def _damage(path: Path) -> str | None:
    """What is wrong with a file that has to hold JSON."""
    if path.suffix != ".json":
        return None
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"{path} ({path.stat().st_size} bytes) is truncated or damaged, download it again: {one_line(error)}"
    return None


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is a part of
        return False


# Token ids of a text or of messages, by what a checkpoint brings along: a tokenizer, and a template, a program.


try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LIMIT_S, LIMIT_S_PER_MB = 10.0, 20.0
"""For a text, and more for each of its megabytes. Templates take milliseconds, tokenizers a second per megabyte."""
MEMORY_BYTES = 10**9
"""What they may take beside what the process has."""
_DONE, _FAILED = b"D", b"F"
# What templates call the switch: Qwen's, GLM's, SmolLM's and Hunyuan's; Granite's and DeepSeek's.
_THINKING = ("enable_thinking", "thinking")
_CODE = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
PATIENCE_S = 1.0
"""Twice as long a process may wait, in vain, before it is asked again."""
_TRIES = 5
_PIECE_BYTES = 1 << 20

Ids = list[int]
_kept: WeakValueDictionary[Path, Tokenizer] = WeakValueDictionary()


def tokenizer_of(directory: Path) -> Tokenizer:
    """The tokenizer of the checkpoint there, and back to the system what reading it took: its words are parsed from
    text, and malloc keeps what that needed (0.2 GB for 262,144 of them). CheckpointError if none can be loaded."""
    return kept(directory, load_tokenizer(directory))


def kept(path: Path, tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, just made of what is at `path`: `kept_tokenizer` finds it as long as somebody keeps it."""
    give_back_freed()
    _kept[path.resolve()] = tokenizer
    return tokenizer


def kept_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of the checkpoint there that somebody has, for those who read with it alone; None: nobody has."""
    return _kept.get(path.resolve())


def encode(tokenizer: Tokenizer, text: str) -> Ids:
    """Token ids of `text`, with the special tokens that the tokenizer adds. CheckpointError where it fails."""
    return _begun_once(tokenizer, bounded(lambda: tokenizer(text)["input_ids"], len(text)))


def encode_messages(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], *, thinking: bool | None = None, **variables: Any
) -> Ids:
    """Token ids of `messages` in the chat template, up to where the answer begins; `variables` are the template's,
    tools among them. TemplateError where it fails, UsageError if `thinking` is given and the template has no switch
    for it."""
    letters = sum(len(str(part)) for message in [*messages, variables] for part in message.values())
    switches = {} if thinking is None else dict.fromkeys(thinking_switches(tokenizer), thinking)
    settings: dict[str, Any] = {"add_generation_prompt": True, **switches, **variables}
    try:
        return _begun_once(tokenizer, bounded(lambda: _templated(tokenizer, messages, settings), letters))
    except CheckpointError as error:
        raise TemplateError(str(error)) from error


def _templated(tokenizer: Tokenizer, messages: list[dict[str, Any]], settings: dict[str, object]) -> Ids:
    taken = _as_taken(tokenizer, messages, settings)
    found: Ids = tokenizer.apply_chat_template(taken, return_dict=True, **settings)["input_ids"]
    return found


def _as_taken(tokenizer: Tokenizer, messages: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """`messages`, or with lists of parts for texts, where the template leaves the last text out or fails otherwise:
    those of models that see or hear go through parts, and may find none in a text."""
    parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    for form in (messages, parts):
        with contextlib.suppress(Exception):  # told by whoever uses what is returned
            if messages[-1]["content"].strip() in tokenizer.apply_chat_template(form, tokenize=False, **settings):
                return form
    return messages


def _begun_once(tokenizer: Tokenizer, ids: Ids) -> Ids:
    """`ids` with one beginning of sequence: a text that starts with it, as templates write it, gets another from the
    tokenizer, and some models answer otherwise then (Gemma)."""
    begin, again = tokenizer.bos_token_id, 0
    while begin is not None and ids[again : again + 2] == [begin, begin]:
        again += 1
    return ids[again:]


_QUESTION, _ANSWER = "Question", "Answer"


def template_end(tokenizer: Tokenizer) -> Ids:
    """The special token that the chat template writes behind an answer: one id or none. CheckpointError where the
    template fails."""
    return bounded(lambda: _behind_answer(tokenizer), len(_QUESTION + _ANSWER))


def _behind_answer(tokenizer: Tokenizer) -> Ids:
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    text = tokenizer.apply_chat_template(_as_taken(tokenizer, messages, {}), tokenize=False)
    _, found, behind = text.rpartition(_ANSWER)
    special = {one.content: token for token, one in tokenizer.added_tokens_decoder.items() if one.special}
    first = [word for word in special if found and behind.lstrip().startswith(word)]
    return [special[max(first, key=len)]] if first else []


def template_code(tokenizer: Tokenizer) -> str:
    """The text of the chat template, "" without one; of several that for tools, else the default."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else template.get("tool_use", template.get("default", ""))


def template_has(tokenizer: Tokenizer, variable: str) -> bool:
    """Whether the chat template asks for a variable."""
    return re.search(rf"\b{variable}\b", " ".join(_CODE.findall(template_code(tokenizer)))) is not None


def thinking_switches(tokenizer: Tokenizer) -> list[str]:
    """Variables of the chat template that turn thinking on and off; UsageError if it has none."""
    code = " ".join(_CODE.findall(template_code(tokenizer)))
    found = [name for name in _THINKING if re.search(rf"\b{name}\b", code)]
    if not found:
        raise UsageError(
            f"the model's chat template has no switch for thinking ({' or '.join(_THINKING)}): leave --thinking and "
            "--no-thinking (thinking) out"
        )
    return found


def bounded(work: Callable[[], Sequence[int]], letters: int) -> Ids:
    """What `work` returns, or CheckpointError with what it raised, or which limit it met."""
    if not hasattr(os, "fork"):
        try:
            return list(work())
        except Exception as error:
            raise CheckpointError(one_line(error)) from error
    limit_s = LIMIT_S + LIMIT_S_PER_MB * letters / 1e6
    # A lock that another thread held when the child was made is never given back in there.
    answers = (_asked(work, limit_s) for _ in range(_TRIES))
    answer = next((found for found in answers if found is not None), None)
    if answer is None:
        raise CheckpointError(f"it waited for something {_TRIES} times and did not go on")
    if answer[:1] == _DONE:
        ids = array.array("q")
        ids.frombytes(answer[1:])
        return ids.tolist()
    said = answer[1:].decode(errors="replace") or f"it needs more than {format_bytes(MEMORY_BYTES)} of memory"
    raise CheckpointError(said)


def _asked(work: Callable[[], Sequence[int]], limit_s: float) -> bytes | None:
    """What a child says; None where it waits and computes nothing."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads: the child takes none of their locks
        pid = os.fork()
    if pid == 0:
        _child(work, write, limit_s)
    os.close(write)
    try:
        return _read_all(read, pid, limit_s)
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # an answer is whole when the pipe is closed
        os.waitpid(pid, 0)


def _child(work: Callable[[], Sequence[int]], pipe: int, limit_s: float) -> None:
    """Never returns, and runs nothing of what the parent would do at its end or on a signal."""
    answer = _FAILED
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
        _limit(limit_s)
        with contextlib.suppress(OSError):  # at the limit on open files native code may print where it panics
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        answer = _DONE + array.array("q", work()).tobytes()
    except MemoryError:
        pass
    except BaseException as error:
        answer = _FAILED + one_line(error).encode(errors="replace")
    finally:
        with contextlib.suppress(BaseException):
            view = memoryview(answer)
            while view:
                view = view[os.write(pipe, view) :]
        os._exit(0)


def _limit(limit_s: float) -> None:
    seconds = int(limit_s) + 5  # should the parent not be there any more to count them
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(OSError, ValueError):  # no /proc, or a lower limit is there already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _read_all(pipe: int, pid: int, limit_s: float) -> bytes | None:
    """All that comes until the other end is closed; None where the process `pid` behind it waits, CheckpointError when
    it takes too long."""
    found, end = bytearray(), time.monotonic() + limit_s
    before: tuple[str, str] | None = None
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while (left := end - time.monotonic()) > 0:
        if not poll.poll(min(left, PATIENCE_S) * 1000):
            now = _ticks_of_sleeper(pid)
            if now is not None and now == before:
                return None
            before = now
            continue
        piece = os.read(pipe, _PIECE_BYTES)
        if not piece:
            return bytes(found)
        found += piece
    raise CheckpointError(f"it takes more than {limit_s:.0f} s")


def _ticks_of_sleeper(pid: int) -> tuple[str, str] | None:
    """The processor time of a process that waits for something but a disk; None of others, and where no /proc says."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (numbers[10], numbers[11]) if state == "S" else None
