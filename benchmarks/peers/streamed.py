"""What peers built on transformers have in common: greedy `generate` with a streamer that calls back at each token."""

from collections.abc import Callable
from typing import Any

import torch
from peers.protocol import Generate
from transformers.generation.streamers import BaseStreamer


class Callback(BaseStreamer):
    """`generate` hands over the prompt first, which is no token of the answer."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.on_token = on_token
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.on_token()
        self.prompt_seen = True

    def end(self) -> None:
        pass


def generating(model: Any) -> Generate:
    def generate(ids: list[int], new_tokens: int, on_token: Callable[[], None]) -> list[int]:
        output = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            streamer=Callback(on_token),
        )
        return output[0, len(ids) :].tolist()  # type: ignore[no-any-return]

    return generate
