"""A corpus that needs no download: sentences from the docstrings of installed Python packages.

The true label of a sentence is the subject area of its module. Sources are parsed, never imported.
Docstrings are split into sentences, and everything but plain English prose is dropped. Words that reveal
the area (a module's dotted path, names of packages) are masked. Modules, not sentences, are assigned to
three splits by a hash of their name: no module is in two splits, and the same package versions always give
the same corpus.

Uses the standard library only: to read in several processes, :func:`read_corpus` runs this file as a script,
which starts in a tenth of a second.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Subject areas with their packages or modules. Only the standard library and packages that every
# installation of llkd-ray includes, on CPU and GPU machines.
AREAS: Mapping[str, tuple[str, ...]] = {
    "algebra": ("sympy", "mpmath"),
    "drawing": ("matplotlib", "mpl_toolkits", "PIL", "fontTools", "turtle"),
    "graphs": ("networkx",),
    "learning": ("sklearn", "sentence_transformers", "torch.nn", "torch.optim", "torch.distributions"),
    "parallel": ("ray", "asyncio", "concurrent", "joblib", "multiprocessing", "threading"),
    "tables": ("pandas", "pyarrow", "datasets", "narwhals"),
    "web": (
        *("aiohttp", "dns", "fastapi", "google.api_core", "google.auth", "httpcore", "httpx", "requests"),
        *("starlette", "urllib3", "uvicorn", "websockets"),
        *("email", "ftplib", "http", "imaplib", "poplib", "smtplib", "socket", "socketserver", "ssl"),
        *("urllib", "wsgiref", "xmlrpc"),
    ),
}
# Subpackages whose subject differs from that of their package.
ELSEWHERE = ("ray.air", "ray.llm", "ray.rllib", "ray.serve.llm", "ray.train", "ray.tune")
# Folders and files whose docstrings are copies or unrelated to the package's subject.
_NOT_READ = re.compile(
    r"^(?:tests?|testing|conftest|test_.*|.*_test|examples?|benchmarks?|_?vendor(?:ed)?|_?third_?party.*|"
    r"externals|thirdparty_files)$"
)
# Each split's share of the modules, and its maximum number of sentences per area and per module. A few large
# modules must not dominate an area, especially in the test split.
SHARES: Mapping[str, float] = {"teacher": 0.70, "pool": 0.22, "test": 0.08}
CAPS: Mapping[str, tuple[int, int]] = {"teacher": (1200, 20), "pool": (800, 40), "test": (160, 20)}
MASK = "it"
# Masked in every sentence: common names of packages, which also occur in other packages.
_BRANDS = re.findall(
    r"\S+",
    "sympy mpmath matplotlib pyplot mpl pillow pil fonttools networkx nx sklearn scikit-learn torch pytorch "
    "numpy scipy ray joblib pandas pyarrow arrow narwhals polars aiohttp fastapi httpx starlette urllib3 "
    "uvicorn",
)


@dataclass(frozen=True)
class Sentence:
    """One row of the corpus."""

    id: str
    text: str
    label: str
    module: str
    split: str


_UNDERLINE = re.compile(r"([-=~^\"#*+.`])\1{2,}$")
_NO_PROSE_BELOW = ("attributes", "doctest", "example", "examples", "methods", "references", "see also")
_DIRECTIVE_WITH_PROSE = re.compile(r"\.\. (?:note|tip|warning|important)::\s*")
_NOT_PROSE = (">>>", "...", "|", "+-", "$", "In [", "Out[")
_LEAD = re.compile(
    r"(?:[-*+•]|\(?\d{1,2}[.)])\s+"  # an item of a list
    r"|:\w+[^:`]*:\s*|@\w+\s*\w*:\s*"  # a field of reStructuredText or Epytext
    r"|[*`\"'\w.,\[\] ]{1,60}?(?:\s*\([^)]*\))?\s*:\s+(?=[A-Za-z`])"  # name (type): description
)
_PARAMETER_TYPE = re.compile(r"[*`\w., ]{1,60}? :(?: \S|$)")
_ROLE = re.compile(r":[\w:+-]+:`([^`]*)`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^>`]*>`_{0,2}")
_TICKS = re.compile(r"`{1,2}([^`]*)`{1,2}_{0,2}")
_STARS = re.compile(r"(?<![\w*])\*{1,2}(\w[^*]*?)\*{1,2}(?![\w*])")
_FOOTNOTE = re.compile(r"\s*\[[#\w*]{1,12}\]_")
_GAP = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z])")
_ABBREVIATION = re.compile(
    r"\b(?:e\.g|i\.e|etc|vs|cf|fig|eq|no|resp|approx|al|dr|prof|ref|sec|[a-z])\.$", re.I
)
_CODE = re.compile(r"https?:|www\.|>>>|::|->|=>|[{}\\|^=<>~@#$`]|\.\.\.|__|\bTODO\b|\bXXX\b")
_COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been by can each for from has have if in into is it its may not of on or "
        "should that the these this to used was when which will with you",
    )
)


def sentences(docstring: str) -> Iterator[str]:
    """The clean English sentences of a docstring, in order, without markup."""
    for paragraph in _paragraphs(docstring):
        text = _ROLE.sub(lambda role: role[1].partition("<")[0].strip().rpartition(".")[2], paragraph)
        text = _LINK.sub(r"\1", text)
        text = _TICKS.sub(r"\1", text)
        text = _FOOTNOTE.sub("", _STARS.sub(r"\1", text))
        start = 0
        for gap in _GAP.finditer(text):
            if _ABBREVIATION.search(text, 0, gap.start()):
                continue
            sentence = text[start : gap.end()].strip()
            start = gap.end()
            if is_clean(sentence):
                yield sentence
        if is_clean(rest := text[start:].strip()):
            yield rest


def is_clean(sentence: str, min_words: int = 8, max_words: int = 60) -> bool:
    """Whether the text is one complete English sentence rather than code, markup or symbols.

    ``min_words`` is 8 because shorter sentences ("Return the number of items.") mostly fit every area.
    """
    words = sentence.split()
    if not min_words <= len(words) <= max_words or not sentence.isascii():
        return False
    if (
        not sentence[0].isupper()
        or sentence.rstrip("\"')]")[-1:] not in tuple(".!?")
        or _CODE.search(sentence)
    ):
        return False
    letters = sum(map(str.isalpha, sentence)) + sentence.count(" ")
    code_words = sum("_" in word or "(" in word[1:] or "." in word[:-2] for word in words)
    if letters < 0.88 * len(sentence) or code_words > 0.2 * len(words):
        return False
    return sum(word.lower() in _COMMON_WORDS for word in words) >= 2


def _paragraphs(docstring: str) -> Iterator[str]:
    """Paragraphs of prose, each joined into one line."""
    block: list[str] = []
    block_indent, hangs = 0, False
    for indent, text in [*_prose_lines(docstring), (0, "")]:
        lead = _LEAD.match(text)
        joins = not lead and (indent == block_indent or (hangs and indent > block_indent))
        if block and not (text and joins):
            yield " ".join(block)
            block = []
        if not text:
            continue
        if not block:
            block_indent, hangs = indent, lead is not None
        block.append(text[lead.end() :] if lead else text)


def _prose_lines(docstring: str) -> Iterator[tuple[int, str]]:
    """(indent, text) of each line of prose; an empty text is a paragraph break."""
    lines = inspect.cleandoc(docstring).expandtabs().split("\n")
    skipped_below: int | None = None  # lines indented deeper are a literal block or a directive's body
    skipped_section = False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text and skipped_below is not None:
            if indent > skipped_below:
                continue
            skipped_below = None
        is_underline = bool(_UNDERLINE.fullmatch(text))
        if not is_underline and 0 < len(text) < 60 and _UNDERLINE.fullmatch(following.strip()):
            skipped_section = text.lower() in _NO_PROSE_BELOW
            text = ""
        elif text[-1:] == ":" and text[:-1].lower() in _NO_PROSE_BELOW:
            skipped_below = indent
            text = ""
        elif is_underline or skipped_section or text.startswith(_NOT_PROSE) or _PARAMETER_TYPE.match(text):
            text = ""
        elif text.startswith(".. "):
            if directive := _DIRECTIVE_WITH_PROSE.match(text):
                yield indent, ""
                text = text[directive.end() :]
            else:
                skipped_below = indent
                text = ""
        elif text.endswith("::"):
            skipped_below = indent
            text = text[:-2] + "."
        yield indent, text


def names_to_mask(module: str) -> re.Pattern[str]:
    """A pattern that matches the parts of the module's dotted path and well-known package names.

    It matches whole words only, case-insensitively, singular or plural.
    """
    parts = {part.strip("_") for part in module.split(".")}
    names = sorted(
        {*(part for part in parts if len(part) > 1), *_BRANDS}, key=lambda name: (-len(name), name)
    )
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, names))})(?:e?s)?(?![\w-])", re.IGNORECASE)


def fingerprint(text: str) -> str:
    """A key that is equal for texts that differ only in case, digits or spacing."""
    return re.sub(r"\d+", "0", " ".join(text.casefold().split()))


def split_of(module: str) -> str:
    """The split of a module; depends only on its dotted name."""
    left = _hash(f"split:{module}") / 2**64
    for split, share in SHARES.items():
        left -= share
        if left < 0:
            return split
    return next(iter(SHARES))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def area_of(module: str, areas: Mapping[str, Sequence[str]] = AREAS) -> str | None:
    """The subject area of a dotted module name, by the longest matching prefix."""
    if _is_under(module, ELSEWHERE):
        return None
    found = [
        (len(name), area) for area, names in areas.items() for name in names if _is_under(module, (name,))
    ]
    return max(found)[1] if found else None


def _is_under(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def find_modules(package: str) -> dict[str, Path]:
    """Dotted names and source files of a package's modules, or of a single module; nothing is imported."""
    top, *below = package.split(".")
    spec = find_spec(top)
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        return {top: Path(spec.origin)} if spec.origin and spec.origin.endswith(".py") else {}
    modules: dict[str, Path] = {}
    for location in spec.submodule_search_locations:
        root = Path(location, *below)
        files = root.rglob("*.py") if root.is_dir() else [root.with_suffix(".py")]
        for file in files:
            parts = [top, *file.relative_to(location).with_suffix("").parts]
            if file.exists() and not any(_NOT_READ.match(part) for part in parts[1:]):
                modules[".".join(parts).removesuffix(".__init__")] = file
    return modules


def docstrings(source: bytes) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, in order; SyntaxError if it does not parse."""
    stack: list[ast.AST] = [ast.parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            text := ast.get_docstring(node, clean=False)
        ):
            yield text
        # Only statements can contain definitions; visiting expressions as well would dominate the run time.
        inner = getattr(node, "body", [])
        stack.extend(
            child
            for child in reversed(inner)
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.Try))
        )


def read_corpus(
    areas: Mapping[str, Sequence[str]] = AREAS,
    caps: Mapping[str, tuple[int, int]] = CAPS,
    processes: int = 2,
    say: Callable[[str], None] = print,
) -> list[Sentence]:
    """Read, clean, mask, de-duplicate and split; sorted by module, then by position in the module.

    A text that occurs in two areas is dropped, as its label is ambiguous. Raises RuntimeError if an area has
    no sentences in a split.
    """
    work = {area: _modules_to_read(area, areas, say) for area in areas}
    found: list[Sentence] = []
    with ThreadPoolExecutor(processes) as threads:  # each thread waits for one process
        tasks = [threads.submit(_read_in_process, area, modules, caps, say) for area, modules in work.items()]
        for task in tasks:
            found += task.result()
    areas_of: dict[str, set[str]] = {}
    for sentence in found:
        areas_of.setdefault(fingerprint(sentence.text), set()).add(sentence.label)
    corpus = [sentence for sentence in found if len(areas_of[fingerprint(sentence.text)]) == 1]
    counts = Counter((sentence.split, sentence.label) for sentence in corpus)
    for split in SHARES:
        for area in areas:
            if not counts[split, area]:
                raise RuntimeError(
                    f"the quickstart's corpus has no sentence about {area!r} for its {split} split: "
                    f"install one of {', '.join(areas[area])}, or give a config file of your own"
                )
    return sorted(corpus, key=lambda sentence: sentence.module)  # stable: order within a module is kept


def _modules_to_read(
    area: str, areas: Mapping[str, Sequence[str]], say: Callable[[str], None]
) -> list[tuple[str, str, str]]:
    """(module, file, split) of an area's modules, shuffled by hash to mix the packages."""
    files: dict[str, Path] = {}
    for package in areas[area]:
        modules = find_modules(package)
        if not modules:
            say(f"corpus: package {package} is not here; the area {area!r} does without it")
        files |= {module: file for module, file in modules.items() if area_of(module, areas) == area}
    ordered = sorted(files, key=lambda module: (_hash(module), module))
    return [(module, str(files[module]), split_of(module)) for module in ordered]


def _read_in_process(
    area: str,
    modules: Sequence[tuple[str, str, str]],
    caps: Mapping[str, tuple[int, int]],
    say: Callable[[str], None],
) -> list[Sentence]:
    """Read one area in a subprocess, which shares this process's stderr."""
    begun = told = time.monotonic()
    command = [sys.executable, "-I", os.path.abspath(__file__)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # The child reads all input before it writes output, so the pipes cannot deadlock.
        process.stdin.write(json.dumps({"modules": modules, "caps": dict(caps)}))
        process.stdin.close()
        rows = []
        for line in process.stdout:
            rows.append(json.loads(line))
            if time.monotonic() - told > 3:
                told = time.monotonic()
                say(f"corpus: {area}: {len(rows):,} sentences so far")
    if process.returncode:
        raise RuntimeError(f"reading the docstrings of area {area!r} failed; the cause is printed above")
    n_modules = len({module for module, _, _ in rows})
    took = time.monotonic() - begun
    say(f"corpus: {area}: {len(rows):,} sentences of {n_modules} modules, {took:.0f} s")
    return [
        Sentence(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), text, area, module, split)
        for module, split, text in rows
    ]


def read_area(
    modules: Sequence[tuple[str, str, str]], caps: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, str, str]]:
    """(module, split, masked sentence) of each (module, file, split), in order, until all splits are full.

    ``caps``: each split's maximum number of sentences, in total and per module.
    """
    taken: Counter[str] = Counter()
    seen: set[str] = set()
    for module, file, split in modules:
        in_all, of_one_module = caps[split]
        room = min(of_one_module, in_all - taken[split])
        source = Path(file).read_bytes() if room > 0 else b""
        if b'"""' not in source and b"'''" not in source:
            continue
        names = names_to_mask(module)
        try:
            texts = [names.sub(MASK, text) for doc in docstrings(source) for text in sentences(doc)]
        except (SyntaxError, ValueError):  # a template, or code for another Python version
            continue
        for text in texts:
            if room > 0 and fingerprint(text) not in seen:
                seen.add(fingerprint(text))
                taken[split] += 1
                room -= 1
                yield module, split, text


def main() -> None:
    """Read {modules, caps} from standard input and print one JSON line for each sentence."""
    gc.disable()  # the syntax trees are large and have no cycles; this halves the run time
    warnings.simplefilter("ignore")  # invalid escape sequences in the packages' sources
    job = json.load(sys.stdin)
    for row in read_area(job["modules"], job["caps"]):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
