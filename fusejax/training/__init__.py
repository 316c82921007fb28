"""Continual training of the target: L = λ·L_CLM + (1−λ)·L_Fusion (FuseLLM, eq. 5), on optax, resumable.

A job has up to two *runs* that see the same batches: `fused`, and `clm` (λ = 1, no sources), which is what fusion has
to beat. Under fusion.kind `pairwise` there is a run `pair/SOURCE` for each source instead of `fused`, and the stage
`export` merges what they made. Each run has its own folder with checkpoints and metrics; a run that is done is skipped,
a half-done one goes on. `runs` says which there are and what each depends on, `state` lays out what is trained, `step`
is the jitted function, `loop` runs it.
"""

from fusejax.training.exporting import export, export_run, pair_merge
from fusejax.training.loop import check, run, train
from fusejax.training.runs import (
    PAIR,
    check_models,
    check_settings,
    read_record,
    run_config,
    run_folder,
    run_inputs,
    runs,
)
from fusejax.training.state import Trainer

__all__ = [
    "PAIR",
    "Trainer",
    "check",
    "check_models",
    "check_settings",
    "export",
    "export_run",
    "pair_merge",
    "read_record",
    "run",
    "run_config",
    "run_folder",
    "run_inputs",
    "runs",
    "train",
]
