"""The embedded demo: a small Llama that was trained on children's stories, by examples/train_demo.py."""

from pathlib import Path

PROMPT = (
    "Once upon a time, there was a little girl named Lucy. She lived in a small house near the forest with her mother "
    "and her dog, Max. One day, Lucy and Max went for a walk in the forest. They saw a small bird under a big tree. "
    "The bird was sad because it had hurt its wing."
)


def demo_directory() -> Path:
    """The demo's checkpoint, in Hugging Face layout."""
    return Path(__file__).parent / "model"
