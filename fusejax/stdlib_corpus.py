"""Text that every Python already has: the corpus of the quickstart (`corpus: {path: "stdlib:"}`).

Three domains, made from the running Python, so that nothing is downloaded:

- `code`: the modules of the standard library, one document each, as `ast.unparse` prints them
  (uniform layout) without docstrings and comments;
- `docs`: the English of the same modules: their docstrings, each headed by the name of what it
  describes, their comments, and the topics of `pydoc` (sections of the language reference);
- `unicode`: the character database of `unicodedata`, 64 code points a document, one line a character.

Three splits: `train` (what the quickstart's models were pretrained on), `fusion` (about 20%; nothing
was pretrained on it) and `heldout` (about 10%; for evaluation only). A hash of the *name* decides: of the
top-level module, or of the block of code points. So a package lies in one split as a whole, in `code` and
in `docs` alike, and lies in the same one on every Python version, although the texts differ a little
between versions. Modules that some distributions leave out (tkinter, idlelib, test, ...) are not used.
"""

import ast
import sys
import sysconfig
import tokenize
import unicodedata
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from fusejax.errors import UserError

DOMAINS = ("code", "docs", "unicode")
# Shares of the hash's range.
SPLITS = {"heldout": (0.0, 0.1), "fusion": (0.1, 0.3), "train": (0.3, 1.0)}
_SALT = "fusejax 0"

# Not everywhere (Debian's packages, Python 3.12 and later), or tables rather than code (encodings).
_LEFT_OUT = {
    "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtle",
    "turtledemo",
}  # fmt: skip
# Modules that share long passages: one name, one split. (Measured: no others share twenty lines.)
_RELATED = {
    "lzma": "bz2", "gzip": "bz2", "cProfile": "profile", "pstats": "profile", "ntpath": "posixpath",
    "genericpath": "posixpath", "aifc": "wave", "chunk": "wave", "sunau": "wave", "xmlrpc": "xml",
}  # fmt: skip
# Names that are computed from the code point, or sequences without content, would drown the rest.
_ALGORITHMIC = ("CJK ", "HANGUL SYLLABLE", "TANGUT ", "NUSHU ", "KHITAN ", "VARIATION SELECTOR")
_BLOCK = 64


class Text(NamedTuple):
    """One document: its domain, its name (unique in the domain) and what it says."""

    domain: str
    name: str
    text: str


def documents(split: str) -> Iterator[Text]:
    """The documents of `split`, domain after domain, each domain in the order of a hash.

    So the first documents of a domain are a random sample of it, the same on every machine.
    Raises UserError for an unknown split, or where Python came without the sources of its library.
    """
    if split not in SPLITS:
        raise UserError(f"stdlib: has no split {split!r}; it has {', '.join(SPLITS)}")
    yield from _texts(split)


@cache  # a corpus is read more than once: to number its documents, to split them, to store them
def _texts(split: str) -> tuple[Text, ...]:
    low, high = SPLITS[split]
    modules = [(name, path) for name, path in _modules() if low <= _position(_family(name)) < high]
    modules.sort(key=lambda item: _position(item[0]))
    made = [(name, *_code_and_docs(name, path)) for name, path in modules]
    texts = [Text("code", name, code) for name, code, _ in made]
    texts += [Text("docs", name, docs) for name, _, docs in made]
    if split == "train":  # topics quote one another, so they cannot be divided over the splits
        texts += _topics()
    blocks = [block for block in range(0, sys.maxunicode + 1, _BLOCK) if low <= _position(_block_name(block)) < high]
    blocks.sort(key=lambda block: _position(_block_name(block)))
    texts += [Text("unicode", _block_name(block), _characters(block)) for block in blocks]
    return tuple(text for text in texts if text.text.strip())


def _position(name: str) -> float:
    """Where `name` lies in [0, 1): uniform over names, fixed for ever."""
    digest = blake2b(f"{_SALT}:{name}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _family(name: str) -> str:
    """The name that decides a module's split: the top-level one, so that `_pyio` goes with `io`."""
    top = name.partition(".")[0].lstrip("_").removeprefix("py") or name
    return _RELATED.get(top, top)


def _modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of the library's modules written in Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    wanted = sys.stdlib_module_names - _LEFT_OUT
    found = False
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in wanted or {"test", "tests"} & set(parts):
            continue
        found = True
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path
    if not found:
        raise UserError(f"stdlib: needs the library's .py files, and {root} holds none")


def _code_and_docs(name: str, path: Path) -> tuple[str, str]:
    """A module as two texts: its statements, and what it says in English."""
    with tokenize.open(path) as file:
        source = file.read()
    tree = ast.parse(source)
    # (line, text) of comments and docstrings, to be put in the order of the file.
    passages = list(_comments(source))
    for node, qualified in _documented(tree, name):
        text = ast.get_docstring(node)
        if text is None:
            continue
        passages.append((node.body[0].lineno, f"{qualified}\n{text}"))
        node.body[:1] = [ast.Pass()] if len(node.body) == 1 and node is not tree else []
    docs = "\n\n".join(text for _, text in sorted(passages))
    return ast.unparse(tree) + "\n", docs + "\n"


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: ast.AST, name: str) -> Iterator[tuple[_Documented, str]]:
    """Everything at or below `node` that can have a docstring, with its qualified name."""
    if isinstance(node, _Documented):
        yield node, name
    for child in ast.iter_child_nodes(node):
        yield from _documented(child, f"{name}.{child.name}" if hasattr(child, "name") else name)


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each run of whole-line comments, without the marks."""
    run: list[str] = []
    first = 0
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        text = line.strip()
        if text.startswith("#"):
            first = first if run else number
            run.append(text.lstrip("#!:").strip())
        elif run:
            if any(run):
                yield first, "\n".join(run).strip()
            run = []


def _topics() -> list[Text]:
    from pydoc_data.topics import topics

    return [Text("docs", f"topic {name}", topics[name].strip() + "\n") for name in sorted(topics, key=_position)]


def _block_name(block: int) -> str:
    return f"U+{block:04X}"


def _characters(block: int) -> str:
    """One line for each named character of the block: code point, character, category, name."""
    lines = []
    for point in range(block, block + _BLOCK):
        character = chr(point)
        name = unicodedata.name(character, "")
        if name and not name.startswith(_ALGORITHMIC):
            lines.append(f"U+{point:04X} {character} {unicodedata.category(character)} {name}\n")
    return "".join(lines)
