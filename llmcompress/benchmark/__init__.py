"""Speed and memory of models where they run: `llmcompress bench`."""
