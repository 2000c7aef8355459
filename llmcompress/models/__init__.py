"""Dense and compressed models on disk: found, opened, checked, written, and loaded by transformers and PEFT."""
