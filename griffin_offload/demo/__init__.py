"""The embedded demo: a small Llama that was trained on children's stories, by examples/train_demo.py."""

from pathlib import Path

PROMPT = (
    "One day, a little girl named Sue found a big box in the garden. The box was blue and very heavy. Sue wanted to "
    "know what was inside, so she asked her brother Ben to help her. Ben and Sue pulled and pulled until the box was "
    "open. Inside the box, they saw a small toy boat. Sue was very happy. She said,"
)
# What clients of a server call it.
SERVED_NAME = "demo"


def demo_directory() -> Path:
    """The demo's checkpoint, in Hugging Face layout."""
    return Path(__file__).parent / "model"
