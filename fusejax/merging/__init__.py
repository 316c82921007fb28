"""Weight merging of models of one architecture: linear, SLERP, task arithmetic, TIES, DARE, SCE, greedy soup.

See docs/merging.md for the configuration, `fusejax.merging.methods` for the formulas.
"""

from fusejax.merging.config import MergeConfig, MergedModel, load
from fusejax.merging.stage import merge

__all__ = ["MergeConfig", "MergedModel", "load", "merge"]
