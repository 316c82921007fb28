"""Evaluation: bits per byte of every model on held-out documents."""

from fusejax.evaluation.perplexity import DomainSums, bits_per_byte, measure, run

__all__ = ["DomainSums", "bits_per_byte", "measure", "run"]
