"""Every row map with every token map on a source's real rows, as a Markdown table: how docs/alignment.md was measured.

    python scripts/alignment_table.py ROWS_FOLDER --source TOKENIZER --target TOKENIZER [TOKENIZER ...]

ROWS_FOLDER holds texts.jsonl (one {"text": ...} a line) and one .npz with the source's rows of all texts, one after
another: `offsets` int[n_texts + 1], `top_ids` int[N, k], `top_logprobs` float[N, k] and `ce` float[N] (natural
logarithms), one row for each of the source's tokens of the text without special tokens, and their `ids` int[N].
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fusejax import cli
from fusejax.alignment import GoldChain, rows, tokens
from fusejax.alignment.chain import pack_chain
from fusejax.alignment.quality import Quality, measure
from fusejax.alignment.rows import Tokens, row_mapper
from fusejax.alignment.tokens import table_columns, token_table
from fusejax.errors import UserError
from fusejax.tokenizers import Tokenizer

CHAINS = ("off", "spans", "on")  # spans: the chain only where the target's token is more than one source token


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="ROWS_FOLDER")
    parser.add_argument("--source", required=True, metavar="TOKENIZER")
    parser.add_argument("--target", required=True, nargs="+", metavar="TOKENIZER")
    options = parser.parse_args(arguments)
    source_tok = Tokenizer.load(options.source)
    texts, source_rows = load(options.folder, source_tok)
    for name in options.target:
        table = Table(Tokenizer.load(name), source_tok, texts, source_rows)
        print(f"\n### {Path(options.source).name} to {Path(name).name}\n")
        print("\n".join(table.lines()), flush=True)


def load(folder: Path, source_tok: Tokenizer) -> tuple[list[str], list[dict[str, np.ndarray]]]:
    """The texts and each one's rows. Raises UserError where they are not this tokenizer's."""
    try:
        texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").open(encoding="utf-8")]
        archive = np.load(next(iter(sorted(folder.glob("*.npz")))))
        saved = {key: archive[key] for key in ("offsets", "ids", "top_ids", "top_logprobs", "ce")}
        if len(saved["offsets"]) != len(texts) + 1:
            raise ValueError(f"{len(texts)} texts and offsets of {len(saved['offsets']) - 1}")
    except (OSError, StopIteration, KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{folder}: should hold texts.jsonl and one .npz with the source's rows ({error!r})") from None
    source_rows = []
    for text, start, stop in zip(texts, saved["offsets"][:-1], saved["offsets"][1:], strict=True):
        if not np.array_equal(source_tok.encode(text)[0], saved["ids"][start:stop]):
            raise UserError(f"{folder}: its token ids are not those that {source_tok.name} gives for its texts")
        part = slice(start, stop)
        source_rows.append(
            {"ids": saved["top_ids"][part], "logprobs": saved["top_logprobs"][part], "ce": saved["ce"][part]}
        )
    return texts, source_rows


class Table:
    """All methods of one pair of tokenizers, on all rows and on those that every method covers."""

    def __init__(
        self, target_tok: Tokenizer, source_tok: Tokenizer, texts: list[str], source_rows: list[dict[str, np.ndarray]]
    ) -> None:
        self._target_tok, self._source_rows = target_tok, source_rows
        self._tokenized = [(Tokens.of(target_tok, text), Tokens.of(source_tok, text)) for text in texts]
        self._maps = {}
        for method in rows.METHODS:
            mapper = row_mapper(target_tok, source_tok, method)
            pairs = zip(texts, self._tokenized, strict=True)
            self._maps[method] = [mapper(text.encode(), *pair) for text, pair in pairs]
        columns = table_columns(source_tok, "inside")
        self._tables = {m: token_table(target_tok, source_tok, m, columns, self._tokenized) for m in tokens.METHODS}
        self._chain = GoldChain(source_tok)

    def lines(self) -> Iterator[str]:
        """The table in Markdown."""
        yield (
            "| rows | tokens | rows covered | CE, chain " + " | CE, chain ".join(CHAINS) + " | the same, common rows |"
        )
        yield "|---|---|---|" + "---|" * len(CHAINS) + "---|"
        combinations = [(r, t) for r in rows.METHODS for t in tokens.METHODS]
        covered = {combination: self._measure(*combination, "off")[1] for combination in combinations}
        common = [np.logical_and.reduce(masks) for masks in zip(*covered.values(), strict=True)]
        total = sum(len(mask) for mask in common)
        for r, t in combinations:
            share = sum(int(mask.sum()) for mask in covered[r, t]) / total
            everywhere = [self._measure(r, t, chain)[0] for chain in CHAINS]
            there = [self._measure(r, t, chain, common)[0] for chain in CHAINS]
            cells = " | ".join(f"{ce:.2f}" for ce in everywhere)
            yield f"| {r} | {t} | {share:.1%} | {cells} | {' / '.join(f'{ce:.2f}' for ce in there)} |"
        yield ""
        yield f"Common rows: {sum(int(mask.sum()) for mask in common) / total:.1%} of {total}."

    def _measure(
        self, r: str, t: str, chain: str, only: list[np.ndarray] | None = None
    ) -> tuple[float, list[np.ndarray]]:
        """(mean CE, which rows of each document are covered), of all rows or of some."""
        total, covered = Quality(), []
        for i, ((target, source), values) in enumerate(zip(self._tokenized, self._source_rows, strict=True)):
            row_map_T2 = self._maps[r][i].copy()
            if only is not None:
                row_map_T2[~only[i]] = (-1, 0)
            gold_T = None
            if chain != "off":
                gold_T = self._chain(target.boundaries, row_map_T2, source.ids, source.boundaries, values)
            if chain == "spans" and gold_T is not None:
                spans = np.full_like(gold_T, -np.inf)
                packed = pack_chain(gold_T, row_map_T2, values["ce"])
                spans[packed["rows"]] = packed["values"]
                gold_T = spans
            empty = measure(
                total, target, source, row_map_T2, self._tables[t], values, self._target_tok.vocab_size, gold_T
            )
            mask = row_map_T2[:, 0] >= 0
            mask[empty] = False
            covered.append(mask)
        return total.mapped_ce[0] / max(1, total.mapped_ce[1]), covered


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
