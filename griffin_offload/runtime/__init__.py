"""Floor 5: moving bytes, the streamed pass, the loaded model."""
