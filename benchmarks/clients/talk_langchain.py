"""The conversation of `other_clients.py` through LangChain: URL KEY WRONG_KEY JSON, in an environment of its own."""

import json
import sys
from importlib.metadata import version

from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI

url, key, wrong, given = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])


def client(**options):
    options = {"api_key": key, "temperature": 0, "max_tokens": given["max_tokens"], "max_retries": 0, **options}
    return ChatOpenAI(base_url=url, model=given["model"], **options)


chat = [HumanMessage(given["questions"][0])]
whole = client().invoke(chat)
chat += [AIMessage(whole.content), HumanMessage(given["questions"][1])]
pieces = [chunk.content for chunk in client().stream(chat)]
stopped = client().invoke(chat, stop=[given["stop"]])
try:
    client(api_key=wrong).invoke(chat)
    refused = "no"
except Exception as error:
    refused = type(error).__name__
usage = whole.usage_metadata
print(
    json.dumps(
        {
            "version": version("langchain-openai"),
            "first": whole.content,
            "second": "".join(pieces),
            "pieces": sum(map(bool, pieces)),
            "stopped": stopped.content,
            "finish": stopped.response_metadata["finish_reason"],
            "tokens": [usage["input_tokens"], usage["output_tokens"]],
            "refused": refused,
        }
    )
)
