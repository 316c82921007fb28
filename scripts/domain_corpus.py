#!/usr/bin/env python3
"""Splits of several domains' corpora that share no text: for fusion experiments that measure on held-out documents.

    python scripts/domain_corpus.py OUT --corpus legal=legal.jsonl.gz medical=medical.jsonl.gz \
        --split heldout=50000 train=400000

writes OUT/heldout.jsonl and OUT/train.jsonl: one {"domain": ..., "text": ...} a line, up to so many bytes of text of
each domain. Splits are filled in the order in which they are named, with documents in the order of a hash of their
text: equal arguments give equal files, and a split stays what it is when later ones are added or grow.

Documents that have much in common (two versions of one licence) form a group, and a group serves one split only. Two
documents are linked where at least 30% of the smaller one's shingles (runs of 8 words) stand in the other. A group
gives a split at most an eighth of its bytes, so that one long document, or hundreds of versions of one text, are not
the whole split; what it has beyond that is left out. What is printed at the end says how many of a split's shingles
also stand in another split: common phrases.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from fusejax import cli
from fusejax.config import CorpusConfig
from fusejax.corpus import read_documents
from fusejax.errors import UserError
from fusejax.outputs import write_atomically

WORDS = 8  # of a shingle
LINK = 0.3
MOST = 1 / 8  # of a split, from one group


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog="domain_corpus.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder that gets SPLIT.jsonl")
    parser.add_argument("--corpus", nargs="+", required=True, metavar="DOMAIN=PATH", help="text of a domain")
    parser.add_argument("--split", nargs="+", required=True, metavar="NAME=BYTES", help="bytes of text of each domain")
    options = parser.parse_args(arguments)
    sizes = {name: _bytes(name, size) for name, size in pairs("--split", options.split).items()}
    lines: dict[str, list[str]] = {name: [] for name in sizes}
    print("domain, split: documents, bytes of text, 8-word runs that also stand in another split")
    corpora = pairs("--corpus", options.corpus)
    texts = {
        domain: [found.text for found in read_documents(CorpusConfig(path=path))] for domain, path in corpora.items()
    }
    divided = divide(texts, sizes)
    in_split = {name: [text for splits in divided.values() for text in splits[name]] for name in sizes}
    for domain, splits in divided.items():
        for name, chosen in splits.items():
            if not chosen:
                raise UserError(
                    f"--corpus {domain}: {corpora[domain]} holds too little text: nothing is left for split {name!r}"
                )
            lines[name] += [json.dumps({"domain": domain, "text": text}, ensure_ascii=False) for text in chosen]
            others = [text for other, found in in_split.items() if other != name for text in found]
            size = sum(len(text.encode()) for text in chosen)
            print(f"{domain}, {name}: {len(chosen)}, {size:,}, {_common(chosen, others):.1%}", flush=True)
    for name, found in lines.items():
        write_atomically(options.out / f"{name}.jsonl", "".join(f"{line}\n" for line in found))


def pairs(option: str, values: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` arguments; UserError for any other form, and for a name that is given twice."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not (name and equals and rest) or "/" in name:
            raise UserError(f"{option} {value}: should have the form NAME=VALUE")
        if name in found:
            raise UserError(f"{option} {value}: {name!r} is given twice")
        found[name] = rest
    return found


def _bytes(name: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise UserError(f"--split {name}={text}: should be a number of bytes, at least 1")
    return int(text)


def divide(texts: dict[str, list[str]], sizes: dict[str, int]) -> dict[str, dict[str, list[str]]]:
    """Of each domain, for each split of `sizes` (name: bytes of text), the documents of groups that no other split has.

    A group may have documents of several domains.
    """
    everything = [(domain, text) for domain, found in texts.items() for text in found]
    together = groups([text for _, text in everything])
    taken: dict[int, str] = {}  # which split a group is for
    divided: dict[str, dict[str, list[str]]] = {}
    for domain in texts:
        splits: dict[str, list[str]] = {name: [] for name in sizes}
        divided[domain], room = splits, dict(sizes)
        for number, group in enumerate(together):
            own = [everything[i][1] for i in group if everything[i][0] == domain]
            open_ = [name for name in sizes if room[name] >= 0.01 * sizes[name]]  # a cut leaves a little
            name = taken.get(number, open_[0] if open_ else None)
            if not own or name not in open_:
                continue
            taken[number] = name
            left = min(room[name], int(MOST * sizes[name]))
            for document in own:
                text = head(document, left)
                if text.strip():
                    splits[name].append(text)
                    left -= len(text.encode())
                    room[name] -= len(text.encode())
    return divided


def groups(texts: Sequence[str]) -> list[list[int]]:
    """The documents (their numbers) in groups that have little in common, both in the order of a hash."""
    order = sorted(range(len(texts)), key=lambda i: blake2b(texts[i].encode(), digest_size=8).digest())
    leader = {i: i for i in order}

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for i, j in _linked([shingles(text) for text in texts]):
        leader[find(i)] = find(j)
    found: dict[int, list[int]] = defaultdict(list)
    for i in order:
        found[find(i)].append(i)
    return list(found.values())


def _linked(shingles_of: Sequence[set[int]]) -> Iterator[tuple[int, int]]:
    """Pairs of documents of which at least LINK of the smaller one's shingles stand in the other."""
    holders: dict[int, list[int]] = defaultdict(list)
    for i, found in enumerate(shingles_of):
        common = Counter(j for shingle in found for j in holders[shingle])
        for j, n in common.items():
            if n >= LINK * min(len(found), len(shingles_of[j])):
                yield i, j
        for shingle in found:
            holders[shingle].append(i)


def shingles(text: str) -> set[int]:
    """Hashes of the text's runs of 8 words, letters and digits alone; of a shorter text, the one of all its words."""
    letters = "".join(c if c.isalnum() else " " for c in text.lower())
    words = letters.split()
    runs = (" ".join(words[i : i + WORDS]) for i in range(max(len(words) - WORDS + 1, 1)))
    return {int.from_bytes(blake2b(run.encode(), digest_size=8).digest(), "little") for run in runs}


def head(text: str, most: int) -> str:
    """The text's first bytes, at most so many, up to the last line's end in their second half, else the last space."""
    data = text.encode()
    if len(data) <= most:
        return text
    start = data[:most].decode(errors="ignore")
    ends = (start.rfind(mark, len(start) // 2) + 1 for mark in "\n ")
    return start[: next((end for end in ends if end), None)]


def _common(texts: Sequence[str], others: Sequence[str]) -> float:
    """The share of the texts' shingles that also stand in the others."""
    ours = set().union(*map(shingles, texts))
    theirs = set().union(*map(shingles, others)) if others else set()
    return len(ours & theirs) / max(len(ours), 1)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
