"""The index of papers: where each is used, by which recipes, and which row of the results shows it."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scripts.reference.markdown import arxiv_link, numbers_of_papers, page, table

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmcompress"
NAMES = {  # of papers that the code cites by number alone
    "1503.02531": "Knowledge distillation",
    "1511.00363": "BinaryConnect",
    "1910.02054": "ZeRO",
    "2102.05426": "BRECQ",
    "2105.08919": "Logit matching",
    "2106.09685": "LoRA",
    "2110.02861": "8-bit optimizers",
    "2203.08679": "Decoupled distillation",
    "2203.11086": "Oscillations in quantization-aware training",
    "2208.07339": "LLM.int8()",
    "2302.02210": "Oscillation in quantized vision transformers",
    "2305.14314": "QLoRA",
    "2306.08543": "MiniLLM",
    "2308.06689": "ReSTE",
    "2310.08659": "LoftQ",
    "2310.19444": "OFA-KD",
    "2401.06118": "AQLM",
    "2403.17887": "The unreasonable ineffectiveness of the deeper layers",
    "2404.01278": "BiPer",
    "2404.13648": "DIMAP",
    "2407.09141": "Accuracy is not all you need",
    "2407.09527": "BitNet b1.58 reloaded",
    "2410.03129": "ARB-LLM",
    "2410.06040": "QERA",
    "2410.09982": "Self-data distillation",
    "2508.04539": "A top-k successor of decoupled distillation",
    "2602.20816": "A top-k successor of decoupled distillation",
}


@dataclass
class Paper:
    """One paper: the places of the code that name it, and the recipes that use it."""

    number: str
    name: str = ""
    places: list[str] = field(default_factory=list)
    recipes: list[str] = field(default_factory=list)


def paper_index() -> str:
    """Return the page."""
    results = rows_of_results()
    rows = []
    for paper in papers():
        shown = [f"[{name}](../results/methods.md): {results[name]}" for name in paper.recipes if name in results][:3]
        used = ", ".join(f"`{name}`" for name in paper.recipes[:4]) + (", ..." if len(paper.recipes) > 4 else "")
        name = NAMES.get(paper.number) or paper.name
        rows.append(
            [arxiv_link(paper.number), name, "<br>".join(sorted(paper.places, key=_order)), used, "<br>".join(shown)]
        )
    introduction = (
        "Every paper that the code or a recipe cites, by arXiv number. A result is a row of "
        "[the results](../results.md): bits per weight and perplexity on WikiText-2. "
        "[Methods](methods.md) and [losses](losses.md) say how each differs from its paper."
    )
    index = table(["arXiv", "paper", "used by", "recipes", "row of results"], rows)
    return page("Paper index", introduction, [index, *papers_without_part()])


def papers_without_part() -> list[str]:
    """Return the section on papers that neither the code nor a recipe uses."""
    text = (
        "Papers that were weighed for this project; neither the package nor a recipe uses them. What was tried has an "
        "entry in `research/log/`: a paper's idea on a small model, mostly with one seed, "
        "which says little of its own setting."
    )
    papers = yaml.safe_load((ROOT / "scripts" / "reference" / "papers_without_part.yaml").read_text(encoding="utf-8"))
    rows = [
        [arxiv_link(paper["arxiv"]), paper["paper"], paper["why"], log_title(paper.get("tried"))] for paper in papers
    ]
    return ["## Papers without a part here", text, table(["arXiv", "paper", "why", "tried"], rows)]


def log_title(start: str | None) -> str:
    """Return the date and title of the entry of the log whose heading starts so; empty without a start."""
    if start is None:
        return ""
    log = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "research" / "log").glob("*.md")))
    (heading,) = re.findall(rf"^## ({re.escape(start)}.*)$", log, flags=re.MULTILINE)
    return re.sub(r"\s*\([^()]*\)$", "", heading)


def _order(place: str) -> tuple[bool, bool]:
    return not place.startswith("method "), not place.startswith("loss ")


def papers() -> list[Paper]:
    """Return all papers that the package or a recipe cites, in order of their numbers."""
    found: dict[str, Paper] = {}
    recipes = recipes_by_method()
    registered = entries()
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        inside = [entry for entry in registered if entry.path == path]
        for number in numbers_of_papers(text):
            paper = found.setdefault(number, Paper(number))
            paper.name = paper.name or _name(text, number)
            here = [entry for entry in inside if len(inside) == 1 or number in entry.docstring]
            paper.places += [entry.link for entry in here]
            if not here and path.stem != "__init__":
                paper.places.append(f"`{path.relative_to(PACKAGE).as_posix()}`")
            for entry in here:
                if entry.kind == "method":
                    paper.recipes += [one for one in recipes.get(entry.name, []) if one not in paper.recipes]
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        for number in numbers_of_papers(path.read_text(encoding="utf-8")):
            found.setdefault(number, Paper(number)).recipes.append(path.stem)
    return [found[number] for number in sorted(found)]


@dataclass(frozen=True)
class Entry:
    """A method or a loss: its file, and its docstring there."""

    kind: str
    name: str
    path: Path
    docstring: str

    @property
    def link(self) -> str:
        """A link to its part of a page, in Markdown."""
        return f"{self.kind} [{self.name}]({'methods' if self.kind == 'method' else 'losses'}.md#{self.name})"


def entries() -> list[Entry]:
    """Return the registered methods and losses."""
    import llmcompress.losses
    import llmcompress.methods  # noqa: F401 (both register what they hold)
    from llmcompress.losses.loss import feature_losses, losses
    from llmcompress.methods.layer import methods

    kinds: list[tuple[str, Mapping[str, Any]]] = [("method", methods()), ("loss", losses() | feature_losses())]
    return [
        Entry(kind, name, Path(inspect.getfile(each.run)), docstring_of(each.run))
        for kind, registry in kinds
        for name, each in registry.items()
    ]


def docstring_of(run: Callable[..., Any]) -> str:
    """Return what a method or a loss says of itself: its file's docstring, or its own where a file has several."""
    module = importlib.import_module(run.__module__)
    count = len(re.findall(r"^@(?:method|loss|feature_loss)\(", inspect.getsource(module), flags=re.MULTILINE))
    return inspect.getdoc(module if count == 1 else run) or ""


def _name(text: str, number: str) -> str:
    """Return what stands for the paper where it is cited: "PB-LLM (arXiv ...)" or "(PB-LLM, arXiv ...)"."""
    inside = re.search(rf"[(;] ?(?:as |after |of |see |from )?([^();\n]{{2,40}}?), arXiv {number}", text)
    before = re.search(rf"([A-Z][\w#.+-]*(?: [A-Z][\w#.+-]*)*)\s+\(arXiv {number}", text)
    named = inside or before
    return named[1].strip().removeprefix("the ").removesuffix("'s start") if named else ""


def recipes_by_method() -> dict[str, list[str]]:
    """Return the names of the recipes that use a method, those with the fewest steps first."""
    found: dict[str, list[tuple[int, str]]] = {}
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        used = list(methods_in(yaml.safe_load(path.read_text(encoding="utf-8"))))
        for name in dict.fromkeys(used):
            found.setdefault(name, []).append((len(used), path.stem))
    return {name: [recipe for _, recipe in sorted(recipes)] for name, recipes in found.items()}


def methods_in(value: Any) -> Iterator[str]:
    """Yield the methods in a recipe's plain values."""
    if isinstance(value, dict):
        if isinstance(value.get("method"), str):
            yield value["method"]
        value = list(value.values())
    for entry in value if isinstance(value, list) else ():
        yield from methods_in(entry)


def rows_of_results() -> dict[str, str]:
    """Return bits per weight and perplexity by recipe, from the first table of the results that lists it."""
    found: dict[str, str] = {}
    header: list[str] = []
    places = (ROOT / "docs" / "results" / f"{name}.md" for name in ("methods", "budgets"))
    for text in "\n".join(place.read_text(encoding="utf-8") for place in places).splitlines():
        cells = [cell.strip(" *`") for cell in text.strip().strip("|").split("|")] if text.startswith("|") else []
        if not cells:
            header = []
        elif not header:
            header = cells
        elif {"recipe", "bpw", "perplexity"} <= set(header) and len(cells) == len(header):
            row = dict(zip(header, cells))
            found.setdefault(row["recipe"], f"{row['bpw']} bits, {row['perplexity']}")
    return found
