"""fusejax: knowledge fusion of causal language models in JAX.

`fusejax.load` gives a model, `fusejax.alignment` aligns tokenizers, `fusejax.fusion` fuses distributions and
`fusejax.loss` trains on them; `python train.py CONFIG.yaml` runs the whole job.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fusejax.errors import UserError

if TYPE_CHECKING:
    from fusejax.models import load as load

__version__ = "0.1.0"
__all__ = ["UserError", "load"]

# Importing fusejax stays cheap: jax and flax are only imported with what needs them.
_LAZY = {"load": "fusejax.models"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("alignment", "fusion", "loss", "models", "kernels"):
        return importlib.import_module(f"fusejax.{name}")
    raise AttributeError(f"module 'fusejax' has no attribute {name!r}")
