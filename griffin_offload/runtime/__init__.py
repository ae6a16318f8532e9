"""Floor 4: moving bytes, the streamed pass, the loaded model."""
