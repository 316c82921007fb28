"""How models are merged, as keys of a configuration: shared by `fusejax merge` and by pairwise fusion."""

from typing import Literal

from pydantic import Field, model_validator

from fusejax.settings import Section

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "sce", "greedy_soup"]

WITH_BASE = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "sce")
SPARSE = ("ties", "dare_linear", "dare_ties")  # keep a part (`density`) of each task vector
NORMALIZED = ("linear", "ties", "sce", "greedy_soup")
# The keys that only some methods use; some of them belong to subclasses.
_ONLY = {
    "t": ("slerp",),
    "normalize": ("linear", *WITH_BASE),
    "scale": WITH_BASE,
    "rescale": ("dare_linear", "dare_ties"),
    "top": ("sce",),
    "select": ("sce",),
    "density": SPARSE,
    "base": WITH_BASE,
    "corpus": ("greedy_soup",),
}


class MergeKeys(Section):
    """The method and what it is told; see docs/merging.md."""

    method: Method
    t: float = Field(0.5, ge=0, le=1)  # slerp: 0 is the first model, 1 the second
    normalize: bool | None = None  # divide by the sum of weights; default: linear, ties, sce
    scale: float = 1.0  # of the merged task vector (λ)
    rescale: bool = True  # dare: divide what stays by its density
    top: float = Field(1.0, gt=0, le=1)  # sce: part of the positions that is selected, by variance
    select: Literal["mask", "weigh"] = "mask"  # sce: what the selection is used for

    @model_validator(mode="after")
    def _used_by_the_method(self) -> "MergeKeys":
        for key, methods in _ONLY.items():
            field = type(self).model_fields.get(key)
            # The value, not whether it is given: a dumped configuration gives every key.
            if field is not None and getattr(self, key) != field.default and self.method not in methods:
                raise ValueError(f"{key}: not used by method {self.method!r}; it belongs to {', '.join(methods)}")
        if self.method == "greedy_soup" and getattr(self, "corpus", None) is None:
            raise ValueError("corpus: method 'greedy_soup' needs held-out text to choose by")
        return self
