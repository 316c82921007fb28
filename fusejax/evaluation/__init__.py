"""Evaluation: bits per byte of every model on held-out documents."""

from fusejax.evaluation.ensemble import measure_ensemble
from fusejax.evaluation.perplexity import DomainSums, bits_per_byte, measure
from fusejax.evaluation.stage import run
from fusejax.evaluation.standalone import measure_corpus

__all__ = ["DomainSums", "bits_per_byte", "measure", "measure_corpus", "measure_ensemble", "run"]
