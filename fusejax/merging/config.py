"""The configuration of a merge: one YAML file, every key declared here with its default and range."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fusejax import paths, settings
from fusejax.config import CorpusConfig, ModelConfig
from fusejax.errors import UserError
from fusejax.merge_keys import NORMALIZED, SPARSE, WITH_BASE, MergeKeys


class MergedModel(ModelConfig):
    """One of the models that are merged."""

    weight: float | None = None  # default: 1
    density: float = Field(1.0, gt=0, le=1)  # part of the task vector that stays: ties, dare


class MergeConfig(MergeKeys):
    """A merge; see docs/merging.md."""

    models: tuple[MergedModel, ...] = Field(min_length=1)
    base: ModelConfig | None = None  # what the task vectors are measured from
    tokenizer: ModelConfig | None = None  # whose tokenizer goes along; default: the base's, else the first model's
    corpus: CorpusConfig | None = None  # greedy_soup: the held-out text
    max_length: int = Field(2048, ge=8)  # greedy_soup: tokens of a window
    batch_tokens: int = Field(8192, ge=1)  # greedy_soup: tokens of one forward pass
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: each tensor as the base stores it
    seed: int = Field(0, ge=0, lt=2**32)  # dare
    output: str = ""

    @field_validator("models")
    @classmethod
    def _distinct(cls, models: tuple[MergedModel, ...]) -> tuple[MergedModel, ...]:
        seen = [(model.model, model.revision) for model in models]
        for model in models:
            if seen.count((model.model, model.revision)) > 1:
                raise ValueError(f"{model.model} is there twice: give it once, with the weight of both")
        return models

    @model_validator(mode="after")
    def _fits_together(self) -> "MergeConfig":
        method, n = self.method, len(self.models)
        if method in WITH_BASE and self.base is None:
            raise ValueError(f"base: method {method!r} needs the model that the others were trained from")
        if method == "slerp" and n != 2:
            raise ValueError(f"models: method 'slerp' goes from one model to another, here are {n}")
        if method in ("linear", "greedy_soup", "sce") and n < 2:
            raise ValueError(f"models: method {method!r} needs two or more")
        for i, model in enumerate(self.models):
            if self.base is not None and (model.model, model.revision) == (self.base.model, self.base.revision):
                raise ValueError(f"models.{i}: {model.model} is the base: its task vector is zero")
            if "weight" in model.model_fields_set and method in ("slerp", "sce", "greedy_soup"):
                raise ValueError(f"models.{i}.weight: method {method!r} finds its weights itself" + _advice(method))
            if "density" in model.model_fields_set and method not in SPARSE:
                raise ValueError(f"models.{i}.density: not used by method {method!r}")
        if self.normalized and method != "sce" and sum(self.weights) == 0:
            raise ValueError("models: the weights sum to 0; set `normalize: false`, or change them")
        return self

    @model_validator(mode="after")
    def _spares_its_models(self) -> "MergeConfig":
        for model in (*self.models, *([self.base] if self.base else [])):
            if self.output and Path(model.model).resolve() == self.folder.resolve():
                raise ValueError(f"output: {self.output} is one of the models that are merged; choose another folder")
        return self

    @property
    def weights(self) -> list[float]:
        """One for each model."""
        return [1.0 if model.weight is None else model.weight for model in self.models]

    @property
    def normalized(self) -> bool:
        """Whether the merged tensor is divided by the sum of the weights."""
        return self.method in NORMALIZED if self.normalize is None else self.normalize

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @field_validator("output")
    @classmethod
    def _is_a_folder_of_its_own(cls, output: str) -> str:
        if paths.is_remote(output):
            raise ValueError(f"merged models are written to folders, not to {output}")
        if not output or Path.cwd().is_relative_to(Path(output).resolve()):
            raise ValueError(f"should be a folder that the model has to itself, such as merged/NAME, not {output!r}")
        return output


def _advice(method: str) -> str:
    return "; use `t`" if method == "slerp" else ""


def load(path: str | Path, overrides: list[str] | None = None) -> MergeConfig:
    """Read a merge's YAML, apply `key=value` overrides, validate; `output` defaults to merged/NAME for NAME.yaml.

    Raises UserError with one line that names the file and the key.
    """
    values = settings.read(path, overrides)
    if "target" in values:
        raise UserError(
            f"{path}: this is the configuration of a job, not of a merge; `python train.py {path}` takes it"
        )
    values.setdefault("output", f"merged/{Path(path).stem}")
    return settings.check(values, MergeConfig, str(path))
