"""Fusion: the sources' sparse next-token rows become one target distribution for each row of the target model.

Everything is a pure function of arrays, works under `jax.jit` with any leading dimensions (written `...`), computes in
float32 and never makes an array with a vocabulary dimension. Sizes: S sources, K entries of a source's row, M entries
of a fused row, V the target's vocabulary, Vs a source's. An id of −1 is an empty entry and has probability 0.

The steps, after "Knowledge Fusion of Large Language Models" (FuseLLM, section 3), with extensions named where they are:
`map_rows` brings one source's rows into the target's vocabulary, `aligned_ce` and `average_ce` measure how well each
source predicts the text, `fuse` weighs the sources, and `fuse_sources` does all of it.
"""

from fusejax.fusion.combining import (
    Fallback,
    FusedRows,
    FusionSums,
    fuse,
    fuse_sources,
    fusion_sums,
)
from fusejax.fusion.mapping import Collisions, MappedRows, Tail, TokenTable, map_rows, merge_repeated
from fusejax.fusion.weighing import Kind, Level, Weighting, aligned_ce, average_ce, average_per_unit, source_weights

__all__ = [
    "Collisions",
    "Fallback",
    "FusedRows",
    "FusionSums",
    "Kind",
    "Level",
    "MappedRows",
    "Tail",
    "TokenTable",
    "Weighting",
    "aligned_ce",
    "average_ce",
    "average_per_unit",
    "fuse",
    "fuse_sources",
    "fusion_sums",
    "map_rows",
    "merge_repeated",
    "source_weights",
]
