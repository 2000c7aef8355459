"""Write the tables of docs/results.md from the records in docs/results/*.jsonl.

    python scripts/bench/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A verdict on a paper, in claims.jsonl, names the rows
that it rests on: `{trellis-2}` is that row's perplexity, `{trellis-2:bpw}` its bits, `{budgets/2.050}` is of another
table than `methods`. `--check` writes nothing
and ends with 1 where the document is not what the records say.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable

from records import RESULTS, Record, read_records

DOCUMENT = RESULTS.parent / "results.md"
REGION = re.compile(r"<!-- table: ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)
REFERENCE = re.compile(r"\{(?:([\w-]+)/)?([\w.-]+)(?::(\w+))?\}")
UNMEASURED = "not measured yet"
Columns = dict[str, str]  # heading -> format of a cell, over the fields and numbers of a record

SIZE = {"bpw": "{bpw:.3f}", "MB": "{megabytes:.1f}"}
LEARNED: Columns = {
    "text": "{text}",
    "": "{arm}",
    "bpw": "{bpw:.3f}",
    "tokens": "{training_tokens:,}",
    "perplexity": "{perplexity:.3f}",
    "dense": "{perplexity_dense:.3f}",
    "of the gap": "{gap_gone:.0%}",
    "KL": "{kl:.4f} ± {kl_stderr:.4f}",
    "of the KL": "{kl_gone:.0%}",
    "top-1 agreement": "{top1_agreement:.3f}",
}
BOTH_TEXTS: Columns = {
    "WikiText-2": "{perplexity:.2f}",
    "gap": "{gap:.3f}",
    "KL": "{kl:.3f} ± {kl_stderr:.3f}",
    "documentation": "{perplexity_docs:.2f}",
    "gap there": "{gap_there:.3f}",
    "KL there": "{kl_docs:.3f} ± {kl_docs_stderr:.3f}",
}
MINUTES: Columns = {"": "{arm}", "minutes": "{minutes:.0f}", **BOTH_TEXTS}
KINDS: Columns = {
    "text": "{arm}",
    "dense": "{perplexity_dense:.2f}",
    "by attention": "{perplexity_attention:.2f}",
    "gap": "{gap_attention:.3f}",
    "KL": "{kl_attention:.3f} ± {kl_attention_stderr:.3f}",
    "by gradient": "{perplexity_gradient:.2f}",
    "gap ": "{gap_gradient:.3f}",
    "KL ": "{kl_gradient:.3f} ± {kl_gradient_stderr:.3f}",
}
PREDICTED = "{kl_predicted:.3f}, {kl_probing:.3f}"
MAIN_JOB: Columns = {
    "": "{arm}",
    "bytes": "{bytes:,}",
    "bpw": "{bpw:.3f}",
    "model_bpw": "{model_bpw:.3f}",
    "perplexity": "{perplexity:.3f}",
    "ratio": "{ratio_short}",
    "KL": "{kl:.4f}",
    "top-1 agreement": "{top1_agreement:.4f}",
    "llmcompress_pairs": "{pairs:.3f}",
    "seconds": "{seconds:.0f}",
    "peak MB": "{peak_megabytes:.0f}",
}
TABLES: dict[str, Columns] = {
    "summary": {"": "{topic}", "what was measured": "{verdict}"},
    "main": MAIN_JOB,
    "quick": MAIN_JOB,
    "methods": {
        "recipe": "{recipe}",
        "bpw": "{bpw:.3f}",
        "model_bpw": "{model_bpw:.3f}",
        "MB": "{megabytes:.1f}",
        "perplexity": "{perplexity_short}",
        "ratio": "{ratio_short}",
        "held-out error": "{error_heldout:.4f}",
    },
    "budgets": {
        "bpw": "{arm}",
        "MB": "{megabytes:.1f}",
        "perplexity": "{perplexity:.2f}",
        "gap": "{gap:.3f}",
        "KL": "{kl:.3f}",
        "top-1 agreement": "{top1_agreement:.3f}",
        "BLiMP": "{blimp:.3f} ± {blimp_stderr:.3f}",
        "KL predicted, measured (508 probing tokens)": PREDICTED,
    },
    "partial-binarization": {
        "recipe": "{arm}",
        **SIZE,
        "perplexity": "{perplexity:.2f}",
        "gap": "{gap:.3f}",
        "KL": "{kl:.3f}",
        "KL predicted, measured": PREDICTED,
        "layers with a low-rank term, of 210": "{layers_with_low_rank}",
    },
    "stages": {
        "bpw": "{arm}",
        "MB": "{megabytes:.1f}",
        **BOTH_TEXTS,
        "BLiMP": "{blimp:.3f} ± {blimp_stderr:.3f}",
        "minutes": "{minutes:.0f}",
    },
    **dict.fromkeys(("minutes", "equal-minutes"), MINUTES),
    "blocks-that-learn": {
        "": "{recipe}",
        "bpw": "{bpw:.3f}",
        "8 windows": "{perplexity_8:.2f}",
        "32 windows": "{perplexity:.2f}",
        "gap, ln(perplexity / dense) on 32": "{gap:.3f}",
    },
    "speed": {
        "model": "{arm}",
        "MB": "{megabytes:.1f}",
        "tokens/s": "{decode:.1f}",
        "to dense": "{decode_ratio:.2f}",
        "tokens/s of a prompt": "{prefill:.0f}",
        "to dense ": "{prefill_ratio:.2f}",
        "peak MB": "{peak_megabytes:.0f}",
    },
    "shapes": {
        "weights": "{arm}",
        "tokens/s": "{tokens_per_second:.2f}",
        "to dense": "{ratio:.2f}",
    },
    "trellis_codes": {
        "trellis": "{arm}",
        "bpw": "{bpw:.3f}",
        "perplexity": "{perplexity:.2f}",
        "KL": "{kl:.4f} ± {kl_stderr:.4f}",
    },
    "kv_cache": {
        "cache": "{arm}",
        "perplexity": "{perplexity:.3f}",
    },
    "limits": {
        "command": "{arm}",
        "peak GB": "{peak_gigabytes:.2f}",
        "minutes": "{minutes:.1f}",
    },
    **dict.fromkeys(("kinds", "kinds-balanced"), KINDS),
    "more-text": {
        "text": "{arm}",
        "dense": "{perplexity_dense:.2f}",
        "66×1024 tokens": "{perplexity_66:.2f}",
        "gap": "{gap_66:.3f}",
        "KL": "{kl_66:.3f} ± {kl_66_stderr:.3f}",
        "174×1024 tokens": "{perplexity_174:.2f}",
        "gap ": "{gap_174:.3f}",
        "KL ": "{kl_174:.3f} ± {kl_174_stderr:.3f}",
    },
    "costs": {"what": "{arm}", "processor seconds per million weights": "{seconds:.2f}"},
    "bound": {"run": "{arm}", "seconds": "{seconds:.0f}", "bound": "{bound:.0f}", "times the bound": "{ratio:.2f}"},
    "billion": {
        "": "{arm}",
        "bpw": "{bpw:.3f}",
        "seconds": "{seconds:.0f}",
        "processor seconds": "{cpu_seconds:.0f}",
        "peak MB": "{peak_megabytes:.0f}",
    },
    "upcycled": {"model, method": "{arm}", "KL": "{kl:.4f} ± {kl_stderr:.4f}", "perplexity": "{perplexity:.3f}"},
    "ranks": {"processes": "{arm}", "seconds": "{seconds:.1f}", "times as fast": "{speedup:.2f}"},
    "reliability": {"trial": "{arm}", "trials": "{trials}", "outcomes": "{outcomes}"},
    "gguf_types": {
        "type": "{arm}",
        "matrices": "{types}",
        "MB": "{megabytes:.1f}",
        "KL, ours": "{kl_ours:.4f} ± {kl_ours_stderr:.4f}",
        "rounded": "{kl_rounded:.4f}",
        "llama.cpp": "{kl_llama:.4f}",
        "with importance": "{kl_llama_importance:.4f}",
        "ours above the better": "{kl_above:+.4f} ± {kl_above_stderr:.4f}",
        "perplexity, ours": "{perplexity_ours:.2f}",
        "llama.cpp ": "{perplexity_llama:.2f}",
        "with importance ": "{perplexity_llama_importance:.2f}",
    },
    "sparsity": {
        "plan": "{arm}",
        "share of zeros": "{sparsity:.3f}",
        "bpw": "{bpw:.3f}",
        "MB": "{megabytes:.1f}",
        "KL predicted": "{kl_predicted:.3f}",
        "on the probing tokens": "{kl_probing:.3f}",
        "on WikiText-2 test": "{kl:.3f}",
    },
    "float_types": {
        "format, filled by": "{arm}",
        "bytes": "{bytes:,}",
        "output error": "{error:.5f} ± {error_stderr:.5f}",
        "KL": "{kl:.4f} ± {kl_stderr:.4f}",
    },
    "dropped": {
        "blocks dropped": "{arm}",
        "their numbers": "{blocks}",
        "perplexity": "{perplexity:.2f}",
        "KL": "{kl:.4f} ± {kl_stderr:.4f}",
        "top-1 agreement": "{top1_agreement:.3f}",
    },
    **dict.fromkeys(
        (
            "distilled-best",
            "distilled-same-bytes",
            "distilled-20-minutes",
            "distilled-low-rank",
            "distilled-scales-norms",
            "distilled-shortened",
            "distilled-codes",
            "distilled-codes-1",
            "distilled-tied",
            "distilled-narrow",
            "distilled-order",
            "distilled-pruned",
            "distilled-low-rank-50",
        ),
        LEARNED,
    ),
    "drifted": {
        "text": "{text}",
        "": "{arm}",
        "all tokens": "{kl:.4f} ± {kl_stderr:.4f}",
        "that drifted": "{kl_drifted:.4f} ± {kl_drifted_stderr:.4f}",
        "that did not": "{kl_others:.4f} ± {kl_others_stderr:.4f}",
        "of hesitation": "{kl_hesitant:.4f} ± {kl_hesitant_stderr:.4f}",
    },
    "self-data": {
        "": "{arm}",
        "KL, documentation": "{kl_docs:.3f} ± {kl_docs_spread:.3f}",
        "perplexity there": "{perplexity_docs:.2f} ± {perplexity_docs_spread:.2f}",
        "KL, WikiText-2 test": "{kl:.3f} ± {kl_spread:.3f}",
        "perplexity there ": "{perplexity:.2f} ± {perplexity_spread:.2f}",
        "BLiMP": "{blimp:.3f} ± {blimp_spread:.3f}",
    },
    "peers": {
        "tool": "{tool}",
        "arm": "{arm}",
        "bpw": "{bpw:.3f}",
        "perplexity": "{perplexity_short}",
        "gap": "{gap:.3f}",
        "BLiMP": "{blimp:.3f}",
        "Python docs": "{docs_short}",
        "gap there": "{gap_there:.3f}",
        "CPU s": "{cpu_seconds:.0f}",
        "peak MB": "{peak_megabytes:.0f}",
    },
    "lessons": {
        "arm": "{arm}",
        "KL, docs": "{kl_docs:.1f} % ± {kl_docs_spread:.1f}",
        "gap, docs": "{gap_docs:.1f} % ± {gap_docs_spread:.1f}",
        "KL, WikiText": "{kl_wikitext:.1f} % ± {kl_wikitext_spread:.1f}",
        "gap, WikiText": "{gap_wikitext:.1f} % ± {gap_wikitext_spread:.1f}",
    },
    "allocation": {
        "bpw": "{bpw:.3f}",
        "plan": "{plan}",
        "predicted KL": "{kl_predicted:.3f} ({kl_predicted_least:.3f} to {kl_predicted_most:.3f})",
        "KL on the 254 probing tokens": "{kl_probing:.3f} ({kl_probing_least:.3f} to {kl_probing_most:.3f})",
        "KL on WikiText-2 test, 4x256": "{kl:.3f} ({kl_least:.3f} to {kl_most:.3f})",
    },
    "probing-tokens": {
        "probing tokens": "{arm}",
        "KL, seed 0": "{kl_seed_0:.3f}",
        "seed 1": "{kl_seed_1:.3f}",
    },
    "families": {
        "options": "{arm}",
        "predicted KL at 1.6 bits": "{kl_predicted_1_6:.3f}",
        "at 2.0": "{kl_predicted_2_0:.3f}",
        "at 2.5": "{kl_predicted_2_5:.3f}",
        "at 2.0 bits: KL on the 254 probing tokens": "{kl_probing:.3f}",
        "on WikiText-2 test, 4x256": "{kl:.3f}",
    },
    "llm-compressor": {
        "tool": "{tool}",
        "arm": "{arm}",
        "bpw": "{bpw:.3f}",
        "perplexity": "{perplexity:.2f}",
        "seconds": "{seconds}",
        "times faster": "{times_faster:.2f}",
        "peak MB": "{peak_megabytes}",
        "of the peer's peak": "{memory_ratio:.2f}",
    },
    "bitsandbytes": {
        "model": "{arm}",
        "bytes": "{bytes:,}",
        "bpw": "{bpw:.3f}",
        "model_bpw": "{model_bpw:.3f}",
        "KL": "{kl:.4f} ± {kl_stderr:.4f}",
        "top-1 agreement": "{top1_agreement:.4f} ± {top1_agreement_stderr:.4f}",
        "perplexity": "{perplexity:.3f} ± {perplexity_stderr:.3f}",
        "llmcompress_pairs": "{pairs:.3f} ± {pairs_stderr:.3f}",
    },
    "low-rank-pays": {
        "arm": "{arm}",
        "bpw": "{bpw:.3f}",
        "median held-out error": "{error_heldout:.5f}",
        "eora is lower on": "{eora_lower:.0%} of 210 layers",
    },
    "chunked-loss": {
        "tokens": "{arm}",
        "chunked MB": "{chunked_megabytes:.0f}",
        "whole logits MB": "{whole_megabytes:.0f}",
        "chunked s": "{chunked_seconds:.2f}",
        "whole logits s": "{whole_seconds:.2f}",
        "time": "{time_ratio:.2f}",
    },
    "trl": {
        "": "{arm}",
        "steps": "{steps}",
        "tokens": "{training_tokens:,}",
        "seconds": "{seconds:.1f}",
        "in all": "{seconds_in_all:.1f}",
        "tokens/s": "{tokens_per_second:.0f}",
        "KL": "{kl:.4f}",
        "perplexity": "{perplexity:.3f}",
        "KL less per 1000 s": "{kl_gone_per_1000_s:.3f}",
        "peak MB": "{peak_megabytes:.0f}",
    },
    "doors": {
        "checkpoint": "{arm}",
        "engine": "{engine}",
        "largest difference": "{largest_difference:.4f}",
        "mean difference": "{mean_difference:.5f}",
        "MB before": "{megabytes_before:.1f}",
        "MB after": "{megabytes_after:.1f}",
    },
    "support": {
        "family": "{arm}",
        "plan": "{plan}",
        "compress": "{compress}",
        "load": "{load}",
        "generate": "{generate}",
        "distil": "{distil}",
        "dense": "{dense}",
        "GGUF": "{gguf}",
        "compressed-tensors": "{compressed_tensors}",
    },
    "claims": {"paper": "{paper}", "claim": "{claim}", "here": "{verdict}"},
}


def main() -> None:
    """Write the tables, or see that they are current."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is out of date")
    options = parser.parse_args()
    before = DOCUMENT.read_text(encoding="utf-8")
    after = rewritten(before, all_records())
    if options.check:
        sys.exit(int(before != after))
    DOCUMENT.write_text(after, encoding="utf-8")


def all_records() -> list[Record]:
    """Return every record, in the order of the files' names."""
    return [record for path in sorted(RESULTS.glob("*.jsonl")) for record in read_records(path)]


def rewritten(document: str, records: list[Record]) -> str:
    """Return the document with its marked tables as the records say."""

    def table(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n\n{written(found[1], records)}\n<!-- end -->"

    return REGION.sub(table, document)


def written(name: str, records: list[Record]) -> str:
    """Return one table without the columns that are empty in all rows, or a sentence where there is no record."""
    rows = [fields(record, records) for record in current(name, records)]
    if not rows:
        return f"{UNMEASURED.capitalize()}.\n"
    cells = {heading: [cell(form, row) for row in rows] for heading, form in TABLES[name].items()}
    shown = {heading: column for heading, column in cells.items() if any(column)}
    head = f"| {' | '.join(shown)} |\n|{'---|' * len(shown)}\n"
    lines = zip(*shown.values(), strict=True)
    return head.replace("|  |", "| |") + "".join(f"| {' | '.join(line)} |\n".replace("  ", " ") for line in lines)


def current(name: str, records: Iterable[Record]) -> list[Record]:
    """Return the records of a table: of each row the last one, where the row first came, recipes in order of name."""
    rows: dict[tuple[str, str], Record] = {}
    for record in records:
        if record["table"] == name:
            key = (
                record.get("arm") or record.get("recipe") or record.get("paper") or record["topic"],
                record.get("text") or "",
            )
            rows[_key(name, record, key, rows)] = record
    if name != "methods":
        return list(rows.values())
    return sorted(rows.values(), key=lambda record: (record["recipe"] != "dense", _natural(record["recipe"])))


def _key(name: str, record: Record, key: tuple[str, str], rows: dict[tuple[str, str], Record]) -> tuple[str, str]:
    """Tell rows of one name apart: distilled students by the student before them, recipes by their bits."""
    if name.startswith("distilled-") and not record["student"]:
        student = next(before for before in reversed(rows.values()) if before["student"])
        tokens = record["numbers"].get("training_tokens", "")
        return (f"{student['arm']}, {key[0]} {tokens}", key[1])
    if name == "partial-binarization":
        return (f"{key[0]} {record['numbers']['bpw']}", key[1])
    return key


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def fields(record: Record, records: list[Record]) -> Record:
    """Return what cells are made of: the record's fields and numbers, and what follows from them and other rows."""
    if "here" in record:
        return record | {"verdict": verdict(record["here"], records)}
    row = record | record["numbers"]
    if "bytes" in row:
        row["megabytes"] = row["bytes"] / 1e6
    if "peak_memory_bytes" in row:
        row["peak_megabytes"] = row["peak_memory_bytes"] / 1e6
    row |= {key: ", ".join(map(str, value)) for key, value in row.items() if isinstance(value, list)}
    if "perplexity" in row:
        row["perplexity_short"] = short(row["perplexity"])
        row |= _beside_dense(row, records)
    if record["table"].startswith("distilled-"):
        row |= _beside_student(record, records)
    return row


def _beside_dense(row: Record, records: list[Record]) -> Record:
    """Return ratio and gap to the dense model: its perplexity stands in the row, or is a row of the same table."""
    found = {each.get("arm") or each["recipe"]: each["numbers"] for each in current(row["table"], records)}
    dense = found.get("dense", {}).get("perplexity") or row.get("perplexity_dense")
    if dense is None or row["table"].startswith("distilled-"):
        return {}
    ratio = row["perplexity"] / dense
    more = {"ratio_short": short(ratio, 3), "gap": None if row["numbers"] == found.get("dense") else math.log(ratio)}
    if "perplexity_docs" in row:
        docs = row["perplexity_docs"] / found["dense"]["perplexity_docs"]
        more |= {"docs_short": short(row["perplexity_docs"]), "gap_there": math.log(docs) if docs != 1 else None}
    return more


def _beside_student(record: Record, records: list[Record]) -> Record:
    """Return which shares of the gap and of the KL training took away, if the row is of a trained student."""
    if record["student"]:
        return {}
    same = [each for each in records if each["table"] == record["table"]]
    before = [each for each in same[: same.index(record)] if each["student"] and each["text"] == record["text"]][-1]
    old, new = before["numbers"], record["numbers"]
    gap = math.log(old["perplexity"] / old["perplexity_dense"])
    left = math.log(new["perplexity"] / old["perplexity_dense"])
    return {"gap_gone": 1 - left / gap, "kl_gone": 1 - new["kl"] / old["kl"]}


def cell(form: str, row: Record) -> str:
    """Return a cell: each part of the format that the row has a number for, nothing for the others."""
    made: list[str] = []
    for part in re.split(r"(?= ± |, \{| \()", form):
        names = re.findall(r"\{(\w+)", part)
        if all(row.get(name) is not None for name in names):
            made.append(part.format(**row))
    return re.sub(r"(?<=\d)%", " %", "".join(made))


def short(value: float, digits: int = 2) -> str:
    """Return a number whose decimals nobody needs once it is large."""
    if value < 1e5:
        return f"{value:.{digits}f}"
    return f"{value:.0f}" if value < 1e6 else f"{value:.2e}"


def verdict(text: str, records: list[Record]) -> str:
    """Return a verdict with the numbers of the rows that it names."""

    def number(found: re.Match[str]) -> str:
        rows = {row.get("arm") or row["recipe"]: row["numbers"] for row in current(found[1] or "methods", records)}
        key = found[3] or "perplexity"
        return numeral(key, rows[found[2]][key]) if found[2] in rows else UNMEASURED

    return REFERENCE.sub(number, text)


def numeral(key: str, value: float) -> str:
    """Return the number of a row as a verdict writes it."""
    if key == "bpw":
        return f"{value:.3f}"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
