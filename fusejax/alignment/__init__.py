"""Alignment of a source to a target across tokenizers, from text alone: row maps, token maps, gold chains.

`row_map` and `token_map` are for one text and one pair of tokenizers, `run` is the stage that does it for a corpus,
`quality` says how good an alignment is.
"""

from fusejax.alignment.chain import GoldChain, unpack_chain
from fusejax.alignment.quality import quality
from fusejax.alignment.rows import MAX_CONSUMED, map_rows, row_map
from fusejax.alignment.stage import Chains, load_token_table, read_report, run
from fusejax.alignment.tokens import TokenTable, token_map, token_table

__all__ = [
    "MAX_CONSUMED",
    "Chains",
    "GoldChain",
    "TokenTable",
    "load_token_table",
    "map_rows",
    "quality",
    "read_report",
    "row_map",
    "run",
    "token_map",
    "token_table",
    "unpack_chain",
]
