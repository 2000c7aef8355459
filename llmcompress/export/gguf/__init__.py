"""GGUF files for llama.cpp: tensor types, vocabulary, the layout of Llama models, and the file."""
