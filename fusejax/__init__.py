"""fusejax: knowledge fusion of causal language models in JAX.

`fusejax.load` gives a model, `fusejax.generate` continues texts with one, `fusejax.alignment` aligns tokenizers,
`fusejax.fusion` fuses distributions and `fusejax.loss` trains on them; `python train.py CONFIG.yaml` runs the whole
job.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fusejax.errors import UserError

if TYPE_CHECKING:
    from fusejax.models import load as load
    from fusejax.models.generate import generate as generate

__version__ = "0.1.0"
__all__ = ["UserError", "generate", "load"]

# Importing fusejax stays cheap: jax and flax are only imported with what needs them.
_LAZY = {"load": "fusejax.models", "generate": "fusejax.models.generate"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("alignment", "fusion", "loss", "models", "kernels"):
        return importlib.import_module(f"fusejax.{name}")
    raise AttributeError(f"module 'fusejax' has no attribute {name!r}")
