"""Other people's clients talk to a server: curl, LiteLLM, LangChain, llm, OpenAI's for Node and the AI SDK.

    python benchmarks/other_clients.py --env DIR --out OUT

Builds environments for them from the package registries under DIR (kept, and used again), starts `griffin-offload serve
--exact` with a key and the demo model, which gets a chat template of two words for this, and lets every client have one
conversation: an answer, a second question with the answer in pieces, one with a stop string, one with a wrong key. What
they show is compared with the server's own JSON. Clients whose runtime is not here are named in the table. The exit
status is 1 if anything differs. Not for CI: the network is needed.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from report import markdown_table, origin_lines, provenance, write

from griffin_offload.demo import demo_directory

HERE = Path(__file__).parent / "clients"
PYTHON_PACKAGES = ("litellm", "langchain-openai", "llm")
NODE_PACKAGES = ("openai", "ai", "@ai-sdk/openai-compatible")
KEY, WRONG = "sk-of-this-run", "sk-of-another-run"
QUESTIONS = ("Once upon a time there was a little cat", "Then the big dog came home")
MAX_TOKENS = 24
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
SAID = ("first", "second", "stopped", "stopped_alone", "tokens")
LONGEST_S = 180


def build(directory: Path) -> tuple[str, str | None]:
    """The Python of the side environment, and Node if there is one; what is missing is installed."""
    python = directory / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PYTHON_PACKAGES], check=True)
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        return str(python), None
    packages = directory / "node"
    packages.mkdir(parents=True, exist_ok=True)
    if not (packages / "node_modules").exists():
        (packages / "package.json").write_text('{"private": true}')
        subprocess.run([npm, "install", "--silent", "--no-fund", *NODE_PACKAGES], cwd=packages, check=True)
    for script in HERE.glob("*.mjs"):  # Node looks for packages beside the script
        shutil.copy(script, packages)
    return str(python), node


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """A server of the demo with a chat template; its address."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(demo_directory(), folder, dirs_exist_ok=True)
        Path(folder, "chat_template.jinja").write_text(TEMPLATE)
        command = [sys.executable, "-m", "griffin_offload", "serve", "-m", folder, "--port", "0", "--json", "-q"]
        command += ["--device", "cpu", "--max-mem", "6.8MB", "--quantize", "none", "--exact", "--served-name", "demo"]
        environment = os.environ | {"GRIFFIN_OFFLOAD_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise SystemExit("the server did not start")
            yield json.loads(line)["url"]
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                raise SystemExit(f"the server ended with {process.returncode}")


def ask(url: str, messages: list[dict[str, str]], **options: Any) -> dict[str, Any]:
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, **options}
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=LONGEST_S)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def expected(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What clients are given, and what they have to show."""
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    whole = ask(url, chat)
    first = whole["choices"][0]["message"]["content"]
    chat += [{"role": "assistant", "content": first}, {"role": "user", "content": QUESTIONS[1]}]
    second = ask(url, chat)["choices"][0]["message"]["content"]
    given = {"model": "demo", "questions": QUESTIONS, "max_tokens": MAX_TOKENS}
    given |= {"stop": second[14:19], "stop_alone": first[14:19]}
    usage = whole["usage"]
    return given, {
        "first": first,
        "second": second,
        "stopped": second[: second.index(given["stop"])],
        "stopped_alone": first[: first.index(given["stop_alone"])],
        "tokens": [usage["prompt_tokens"], usage["completion_tokens"]],
        "finish": "stop",
    }


def talk_curl(url: str, given: dict[str, Any]) -> dict[str, Any]:
    def curl(messages: list[dict[str, str]], *words: str, key: str = KEY, **options: Any) -> str:
        body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, **options}
        command = ["curl", "-sS", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
        command += ["-H", f"Authorization: Bearer {key}", "-d", json.dumps(body), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST_S).stdout

    chat = [{"role": "user", "content": given["questions"][0]}]
    whole = json.loads(curl(chat))
    first = whole["choices"][0]["message"]["content"]
    chat += [{"role": "assistant", "content": first}, {"role": "user", "content": given["questions"][1]}]
    lines = [line.removeprefix("data: ") for line in curl(chat, "-N", stream=True).splitlines() if line]
    pieces = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines if line != "[DONE]"]
    stopped = json.loads(curl(chat, stop=given["stop"]))["choices"][0]
    version = subprocess.run(["curl", "-V"], check=True, capture_output=True, text=True).stdout.split()[1]
    return {
        "version": version,
        "first": first,
        "second": "".join(pieces),
        "pieces": sum(map(bool, pieces)),
        "stopped": stopped["message"]["content"],
        "finish": stopped["finish_reason"],
        "tokens": [whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]],
        "refused": curl(chat, "-o", os.devnull, "-w", "%{http_code}", key=WRONG),
    }


def talk(program: str, script: Path, url: str, given: dict[str, Any]) -> dict[str, Any]:
    """The last line of a client's script, or how it failed."""
    command = [program, str(script), f"{url}/v1", KEY, WRONG, json.dumps(given)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST_S)
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return [found["failed"]]
    wrong = [name for name in (*SAID, "finish") if name in found and found[name] != wanted[name]]
    wrong += [] if found["pieces"] > 1 else ["one piece"]
    return wrong + ([] if found["refused"] not in ("", "no", "200") else ["the wrong key was taken"])


def conversations(url: str, python: str, node: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the server says, and what each client shows of it."""
    given, wanted = expected(url)
    found = {"curl": talk_curl(url, given) if shutil.which("curl") else {"missing": "curl"}}
    for name in ("litellm", "langchain", "llm"):
        found[name] = talk(python, HERE / f"talk_{name}.py", url, given)
    for name in ("openai", "ai"):
        script = Path(python).parents[2] / "node" / f"talk_{name}.mjs"
        found[f"{name} (Node)"] = talk(node, script, url, given) if node is not None else {"missing": "node"}
    return wanted, found


def table(found: dict[str, Any]) -> str:
    rows = [["client", "version", "conversation", "pieces of the second answer", "stop string", "wrong key"]]
    for name, own in found.items():
        if "missing" in own:
            rows.append([name, "not here", "-", "-", "-", "-"])
            continue
        wrong = own["differences"]
        said = "as the server's" if not wrong else f"differs: {', '.join(wrong)}"
        stopped = json.dumps(own.get("stopped", own.get("stopped_alone")))
        rows.append(
            [name, own.get("version", "?"), said, str(own.get("pieces")), f"`{stopped}`", own.get("refused", "-")]
        )
    return markdown_table(rows)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, required=True, help="folder for the clients' environments")
    parser.add_argument("--out", type=Path, help="folder for the record")
    options = parser.parse_args(arguments)
    python, node = build(options.env.resolve())
    with serving() as url:
        wanted, found = conversations(url, python, node)
    for own in found.values():
        own["differences"] = [] if "missing" in own else differences(own, wanted)
    record = provenance("other_clients.py", arguments) | {"expected": wanted, "clients": found}
    print(table(found))
    if options.out is not None:
        second = json.dumps(wanted["second"])
        page = f"# Other clients\n\n{origin_lines(record)}\n\nThe second answer: `{second}`\n\n{table(found)}\n"
        write(options.out, "other_clients", page, record)
    print(json.dumps(record))
    return 1 if any(own["differences"] for own in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
