"""The conversation of `other_clients.py` through LiteLLM: URL KEY WRONG_KEY JSON, in an environment of its own."""

import json
import sys
from importlib.metadata import version

import litellm

url, key, wrong, given = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
litellm.suppress_debug_info = True


def ask(messages, **options):
    # A name behind "openai/" is passed on as it is to whoever speaks OpenAI's API at `api_base`.
    options = {"api_key": key, "temperature": 0, "max_tokens": given["max_tokens"], **options}
    return litellm.completion(
        model=f"openai/{given['model']}", api_base=url, messages=messages, num_retries=0, **options
    )


chat = [{"role": "user", "content": given["questions"][0]}]
whole = ask(chat)
first = whole.choices[0].message.content
chat += [{"role": "assistant", "content": first}, {"role": "user", "content": given["questions"][1]}]
pieces = [chunk.choices[0].delta.content or "" for chunk in ask(chat, stream=True) if chunk.choices]
stopped = ask(chat, stop=given["stop"]).choices[0]
try:
    ask(chat, api_key=wrong)
    refused = "no"
except Exception as error:
    refused = type(error).__name__
print(
    json.dumps(
        {
            "version": version("litellm"),
            "first": first,
            "second": "".join(pieces),
            "pieces": sum(map(bool, pieces)),
            "stopped": stopped.message.content,
            "finish": stopped.finish_reason,
            "tokens": [whole.usage.prompt_tokens, whole.usage.completion_tokens],
            "refused": refused,
        }
    )
)
