"""The plug-ins of transformers and PEFT: loading, saving, adapters, the cache of keys and values."""
