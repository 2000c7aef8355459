"""GGUF files for llama.cpp: tensor types, vocabulary, the table of families, a model, and the file."""
