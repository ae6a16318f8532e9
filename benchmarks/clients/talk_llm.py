"""The conversation of `other_clients.py` through the commands of `llm`, a chat program for terminals: URL KEY WRONG_KEY
JSON, in an environment of its own."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

url, key, wrong, given = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
home = tempfile.TemporaryDirectory()
Path(home.name, "extra-openai-models.yaml").write_text(
    f"- model_id: ours\n  model_name: {given['model']}\n  api_base: {url}\n  api_key_name: ours\n"
)
pieces = 0


def llm(*words, key=key):
    """What a command prints, counted by how often it writes."""
    global pieces
    options = ["-m", "ours", "--key", key, "-o", "temperature", "0", "-o", "max_tokens", str(given["max_tokens"])]
    environment = os.environ | {"LLM_USER_PATH": home.name, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "llm", "prompt", *words, *options],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    found, pieces = b"", 0
    while piece := os.read(process.stdout.fileno(), 65536):
        found, pieces = found + piece, pieces + 1
    error = process.stderr.read().decode()
    return found.decode().removesuffix("\n") if process.wait() == 0 else error


first = llm(given["questions"][0], "--no-stream")
second = llm("-c", given["questions"][1])
counted = pieces
logged = subprocess.run(
    [sys.executable, "-m", "llm", "logs", "list", "--json", "-n", "0"],
    env=os.environ | {"LLM_USER_PATH": home.name}, capture_output=True, text=True, check=True,
)  # fmt: skip
usage = json.loads(logged.stdout)[0]
alone = llm(given["questions"][0], "--no-stream", "-o", "stop", given["stop_alone"])
refused = llm(given["questions"][0], "--no-stream", key=wrong)
print(
    json.dumps(
        {
            "version": version("llm"),
            "first": first,
            "second": second,
            "pieces": counted,
            "stopped_alone": alone,
            "tokens": [usage["input_tokens"], usage["output_tokens"]],
            "refused": "401" if "401" in refused or "bearer token" in refused else refused,
        }
    )
)
