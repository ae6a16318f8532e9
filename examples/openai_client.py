"""A conversation with `griffin-offload serve` through the openai client.

pip install openai
griffin-offload serve -m MODEL --max-gpu-mem 12GB        # in another terminal
python examples/openai_client.py [http://127.0.0.1:8000/v1 [KEY]]
"""

import sys
from typing import Any

from openai import OpenAI

QUESTIONS = ("Why is the sky blue?", "And in the evening?")


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    client = OpenAI(base_url=url, api_key=sys.argv[2] if len(sys.argv) > 2 else "unused")
    model = client.models.list().data[0].id
    messages: list[Any] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        print(f"\n> {question}")
        stream = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=200,
            temperature=0.7,
            stream=True,
            stream_options={"include_usage": True},
            # extra_body={"exact": True},  # the full model's own answer, slower
        )
        answer, usage = "", None
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                answer += choice.delta.content or ""
                print(choice.delta.content or "", end="", flush=True)
        messages.append({"role": "assistant", "content": answer})
        # Of the second question only what is new was computed.
        print(f"\n[{usage.prompt_tokens} prompt tokens, {usage.prompt_tokens_details.cached_tokens} of them kept]")


if __name__ == "__main__":
    main()
