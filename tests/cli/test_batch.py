"""`griffin-offload batch`: every request is answered once, whatever happens in between."""

import json
import os
import random
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer

from griffin_offload.serving.batch import AnswerFile, in_turns
from griffin_offload.serving.model_manager import LoadedModel, ModelManager
from griffin_offload.serving.validation import ApiError

OPTIONS = ("--device", "cpu", "--density", 0.5, "--max-mem", "1GB", "--served-name", "tiny")
WORDS = ["the", "cat", "sat", "on", "a", "private", "river", "and", "she", "was", "there", "with", "all", "of", "them"]


def request(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": "tiny", "max_tokens": 5, "temperature": 0, **body}
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def drawn(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(count)]
    return [request(f"r{i}", prompt=text) for i, text in enumerate(texts)]


def written(path: Path, requests: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in requests))
    return path


def answers(path: Path) -> dict[str, Any]:
    """What was said, by custom_id: each comes once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["custom_id"]: line["response"] for line in lines}
    assert len(found) == len(lines)
    return found


def texts(path: Path) -> dict[str, str]:
    return {name: response["body"]["choices"][0]["text"] for name, response in answers(path).items()}


def test_answers_are_those_of_single_requests(cli, llama: Path, tmp_path: Path):
    requests = drawn(6)
    outcome = cli("batch", written(tmp_path / "in", requests), tmp_path / "out", "-m", llama, *OPTIONS)
    assert (outcome.code, outcome.out) == (0, "")
    assert "6 of 6 requests answered" in outcome.err
    found = texts(tmp_path / "out")
    for line in requests:
        alone = ("run", line["body"]["prompt"], "-n", 5, "--temperature", 0, "--raw", "--json")
        assert cli(*alone, "-m", llama, *OPTIONS[:6]).json["text"] == found[line["custom_id"]]


def test_a_chat_several_answers_and_refusals(cli, chat: Path, tmp_path: Path):
    requests = [
        request("chat", messages=[{"role": "user", "content": "a private river"}]),
        request("three", prompt=["the cat", "a river", "she"]),
        request("typo", prompt="the cat", temprature=1),
        request("long", prompt="the cat " * 200),
        request("stream", prompt="the cat", stream=True),
    ]
    options = ("-m", chat, *OPTIONS, "--ctx-size", 100, "--json")
    outcome = cli("batch", written(tmp_path / "in", requests), tmp_path / "out", *options)
    assert outcome.code == 1
    assert outcome.json["failed"] == 3
    found = answers(tmp_path / "out")
    assert len(found["three"]["body"]["choices"]) == 3
    assert found["chat"]["body"]["choices"][0]["message"]["role"] == "assistant"
    errors = {name: found[name]["body"]["error"]["param"] for name in ("typo", "long", "stream")}
    assert errors == {"typo": "temprature", "long": "prompt", "stream": "stream"}
    assert {found[name]["status_code"] for name in errors} == {400}


def test_another_model_in_a_line_is_that_lines_error(cli, llama: Path, tmp_path: Path):
    requests = drawn(4)
    requests[0]["body"]["model"] = "gpt-5"
    del requests[2]["body"]["model"]
    outcome = cli("batch", written(tmp_path / "in", requests), tmp_path / "out", "-m", llama, *OPTIONS, "--json")
    assert (outcome.code, outcome.json["answered"], outcome.json["failed"]) == (1, 4, 2)
    found = answers(tmp_path / "out")
    assert {name: answer["status_code"] for name, answer in found.items()} == {
        "r0": 404,
        "r1": 200,
        "r2": 400,
        "r3": 200,
    }
    assert found["r0"]["body"]["error"]["code"] == "model_not_found"
    assert "'tiny' is served here" in found["r0"]["body"]["error"]["message"]
    assert found["r2"]["body"]["error"]["param"] == "model"


def test_it_goes_on_behind_what_is_there(cli, llama: Path, tmp_path: Path):
    requests, out = drawn(5), tmp_path / "out"
    command = ("batch", written(tmp_path / "in", requests), out, "-m", llama, *OPTIONS, "--json")
    cli(*command)
    whole = out.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:3])
    out.write_bytes(kept + b'{"custom_id": "r4", "resp')  # a line that was not finished
    found = cli(*command)
    assert (found.code, found.json["before"], found.json["answered"]) == (0, 3, 5)
    assert out.read_bytes().startswith(kept)
    again = out.read_bytes()
    assert len(texts(out)) == 5
    assert cli(*command).json["generated_tokens"] == 0
    assert out.read_bytes() == again


@pytest.mark.parametrize(("count", "together"), [(0, 4), (1, 8), (7, 1), (7, 3), (8, 4), (30, 8)])
def test_those_that_are_asked_at_once_begin_differently(count: int, together: int):
    works: list[Any] = list(range(count))
    found = in_turns(works, together)
    assert sorted(found) == works
    assert together > 1 or found == works
    ends = found[:together]  # as far from each other as they can be; each goes on where it is, one further
    assert all(other - one == ends[1] for one, other in pairwise(ends))
    assert count < together or ends[-1] >= count - -(-count // together)
    for one in found[together:]:
        assert one - 1 in ends
        ends[ends.index(one - 1)] = one


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "holds no request"),
        ("{", "line 1 is not JSON"),
        ("[]", "request 1 is no object"),
        ({"custom_id": 3}, "needs a custom_id"),
        ({"method": "GET"}, "method 'GET'"),
        ({"url": "/v1/embeddings"}, "asks for '/v1/embeddings': /v1/chat/completions and /v1/completions"),
        ({"body": "text"}, "needs a body"),
        ({"body": {"model": "gpt-5"}}, "none of 1 requests.*'tiny'.* asks for 'gpt-5': give its name by --served-name"),
        ({"body": {"messages": []}}, "none of 1 requests.*'tiny'.* asks for None: name it in the body"),
    ],
)
def test_files_that_are_none(cli, llama: Path, tmp_path: Path, lines: Any, words: str):
    text = lines if isinstance(lines, str) else json.dumps(request("a", prompt="the cat") | lines)
    (tmp_path / "in").write_text(text)
    cli.refuses(2, words, "batch", tmp_path / "in", tmp_path / "out", "-m", llama, *OPTIONS)
    assert not (tmp_path / "out").exists()


def test_names_twice_and_files_of_others(cli, llama: Path, tmp_path: Path):
    twice, file, out = written(tmp_path / "twice", drawn(1) * 2), written(tmp_path / "in", drawn(2)), tmp_path / "out"
    options = ("-m", llama, *OPTIONS)
    cli.refuses(2, "request 2 has the custom_id 'r0' of an earlier one", "batch", twice, out, *options)
    cli.refuses(2, "is the file of requests", "batch", file, file, *options)
    out.write_text("a letter\n")
    cli.refuses(2, "line 1 is no answer of a batch", "batch", file, out, *options)
    assert out.read_text() == "a letter\n"
    out.unlink()
    with AnswerFile(out) as held:
        cli.refuses(2, "another batch is writing", "batch", file, out, *options)
        held.add("other", 200, {})
    cli.refuses(2, "1 answers to requests that the input lacks, one is 'other'", "batch", file, out, *options)


ROBUST = pytest.mark.skipif("GRIFFIN_ROBUSTNESS" not in os.environ, reason="takes minutes: set GRIFFIN_ROBUSTNESS=1")


@pytest.mark.parametrize(
    ("deaths", "count"),
    [(2, 40), pytest.param(10, 500, marks=[pytest.mark.slow, ROBUST])],
)
def test_killed_at_any_moment_it_misses_nothing(cli, forks: ForkServer, llama: Path, tmp_path: Path, deaths, count):
    requests, out = drawn(count), tmp_path / "out"
    file, options = written(tmp_path / "in", requests), ("-m", llama, *OPTIONS)
    cli("batch", file, tmp_path / "whole", *options)
    rng, step = random.Random(deaths), count * 4 // (5 * deaths)
    for death in range(deaths):
        process = forks.start("-m", "griffin_offload", "batch", file, out, *options)
        enough = rng.randint(step * death + 1, step * death + step)
        while process.wait(0.005) is None and (not out.exists() or out.read_bytes().count(b"\n") < enough):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert 0 < out.read_bytes().count(b"\n") < len(requests)
    assert cli("batch", file, out, *options).code == 0
    assert texts(out) == texts(tmp_path / "whole")


def test_it_ends_where_the_model_is_gone(cli, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And asks for no other request; with the model back, the same command goes on."""
    requests, out, asked = drawn(5), tmp_path / "out", []
    command = ("batch", written(tmp_path / "in", requests), out, "-m", copy, *OPTIONS)
    with monkeypatch.context() as patch:
        get = ModelManager.get

        def gone(self: ModelManager, density: float | None) -> LoadedModel:
            asked.append(density)
            if len(asked) > 2:
                raise ApiError(503, "the model cannot be loaded", code="model_unavailable")
            return get(self, density)

        patch.setattr(ModelManager, "get", gone)
        outcome = cli(*command)
    assert outcome.code == 1
    assert "the model cannot be loaded; what is answered is kept, run the same command again" in outcome.err
    assert "2 of 5 requests answered" in outcome.err
    assert len(texts(out)) == 2
    assert cli(*command).code == 0
    assert len(texts(out)) == 5
