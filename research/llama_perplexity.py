"""Dense perplexity of a GGUF file by this project and by llama.cpp, on the same windows of text.

    python research/llama_perplexity.py --data DATA [--windows 8] [--length 1024] [--jsonl FILE] NAME=MODEL.gguf ...

llmcompress reads the file as any other model: bfloat16 weights, float32 products. llama.cpp, by the library inside the
package xllamacpp, reads a copy whose weights are all F16. Both score the same windows of WikiText-2's
test split, behind BOS where the tokenizer puts it. `--jsonl` collects a record of each model.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch
from records import Record, append, provenance
from torch import Tensor

from llmcompress.evaluation.perplexity import evaluation_windows, perplexity
from llmcompress.evaluation.protocol import Protocol
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.tokenizer import load_tokenizer

TEXT = "wikitext2-test.raw"
# (name, values [out, in] float32) -> what is stored, and its type, None for that of its numbers
Convert = Callable[[str, np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType | None]]
OPAQUE = 4096  # bytes, more than any of llama.cpp's structs of settings: it reads and writes its own size of them


class Settings(ctypes.Structure):
    """The settings of a model or a context: numbers at their beginning, then what this program leaves as it is."""

    _fields_ = (("first", ctypes.c_uint32 * 4), ("rest", ctypes.c_byte * OPAQUE))


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2-test.raw")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--jsonl", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=FILE")
    options = parser.parse_args()
    for name, _, path in (entry.partition("=") for entry in options.models):
        place = locate(path)
        protocol = Protocol(options.data / TEXT, options.windows, options.length)
        windows = evaluation_windows(load_tokenizer(place.folder), protocol)
        own = perplexity(load_model(place), windows).value
        with tempfile.TemporaryDirectory() as folder:
            write_f16(Path(path), Path(folder, "f16.gguf"))
            theirs = llama_perplexity(Path(folder, "f16.gguf"), windows)
        print(f"{name}: llmcompress {own:.3f}, llama.cpp {theirs:.3f}, ratio {own / theirs:.4f}", flush=True)
        numbers = {
            "own": own,
            "llama": theirs,
            "ratio": own / theirs,
            "windows": len(windows),
            "length": options.length,
        }
        if options.jsonl:
            command = f"python research/llama_perplexity.py --data DATA {name}=MODEL.gguf"
            record: Record = {"table": "dense-models", "arm": name, "model": name, "command": command}
            record |= {"text": TEXT, "calibration": None, **provenance()}
            append(options.jsonl, record | {"numbers": numbers})


def write_f16(source: Path, target: Path) -> None:
    """Write a GGUF file again with matrices as F16 and vectors as F32; all else stays."""
    rewrite_matrices(source, target, lambda _, values: (values.astype(np.float16), None))


def rewrite_matrices(source: Path, target: Path, convert: Convert) -> None:
    """Write a GGUF file again with what `convert` makes of each matrix and vectors as F32; all else stays."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stored, kind = (values, None) if values.ndim == 1 else convert(tensor.name, values)
        writer.add_tensor(tensor.name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_perplexity(path: Path, windows: Tensor) -> float:
    """Return exp of the mean loss of llama.cpp over the predicted tokens of windows [n, length]."""
    losses = []
    with load(path, windows.shape[1]) as (library, context, vocabulary):
        for window in windows:
            logits = decode(library, context, window.tolist(), vocabulary)
            logs = torch.from_numpy(logits).double().log_softmax(-1)[:-1]
            losses.append(-float(logs.gather(1, window[1:, None]).mean()))
            print(f"{len(losses)}/{len(windows)} ...", file=sys.stderr, flush=True)
    return math.exp(statistics.fmean(losses))


@contextmanager
def load(path: Path, length: int) -> Iterator[tuple[ctypes.CDLL, ctypes.c_void_p, int]]:
    """Yield llama.cpp's library, a context of `length` tokens over a file, and the size of its vocabulary."""
    import xllamacpp

    [binary] = Path(str(xllamacpp.__file__)).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(binary))
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory", "llama_model_get_vocab"):
        getattr(library, name).restype = ctypes.c_void_p
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(library, name).restype = Settings
    library.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    library.llama_batch_init.restype = Batch
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    library.llama_log_set(quiet, None)
    model = ctypes.c_void_p(
        library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    )
    settings = library.llama_context_default_params()
    settings.first[:3] = length, length, length  # n_ctx, n_batch, n_ubatch
    context = ctypes.c_void_p(library.llama_init_from_model(model, settings))
    if not context.value:
        raise RuntimeError(f"llama.cpp did not load {path}")
    threads = ctypes.c_int32(torch.get_num_threads())
    library.llama_set_n_threads(context, threads, threads)
    vocabulary = library.llama_vocab_n_tokens(ctypes.c_void_p(library.llama_model_get_vocab(model)))
    yield library, context, vocabulary
    library.llama_free(context)
    library.llama_model_free(model)


def decode(library: ctypes.CDLL, context: ctypes.c_void_p, tokens: list[int], vocabulary: int) -> np.ndarray:
    """Return llama.cpp's logits [tokens, vocabulary] of a text by itself."""
    memory = ctypes.c_void_p(library.llama_get_memory(context))
    library.llama_memory_clear(memory, ctypes.c_bool(True))
    batch = library.llama_batch_init(ctypes.c_int32(len(tokens)), ctypes.c_int32(0), ctypes.c_int32(1))
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    status = library.llama_decode(context, batch)
    if status:
        raise RuntimeError(f"llama_decode answered {status}")
    logits = np.ctypeslib.as_array(library.llama_get_logits(context), (len(tokens), vocabulary)).copy()
    library.llama_batch_free(batch)
    return logits


if __name__ == "__main__":
    main()
