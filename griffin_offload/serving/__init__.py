"""Floor 6: the OpenAI-compatible server (extra `serve`)."""
