"""The loaded model: streamed prefill, resident decode, exact mode, chat, convert."""
