"""One table per family of models: its Hugging Face configuration and its tensors, in both directions.

A family is a `Family`: how its config.json reads as a `DecoderConfig` and back, and one `Tensor` per tensor on disk.
Shapes, transposes and splitting derive from the decoder's own declarations.
"""

from typing import Any

from fusejax.errors import UserError
from fusejax.models.config import DecoderConfig
from fusejax.models.families.bloom import BLOOM
from fusejax.models.families.falcon import FALCON
from fusejax.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from fusejax.models.families.gpt2 import GPT2
from fusejax.models.families.gptj import GPTJ
from fusejax.models.families.llama import LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3
from fusejax.models.families.mpt import MPT
from fusejax.models.families.neox import NEOX
from fusejax.models.families.opt import OPT
from fusejax.models.families.phi3 import PHI3
from fusejax.models.families.stablelm import STABLELM
from fusejax.models.families.table import Family, Tensor
from fusejax.models.keys import Keys

__all__ = ["FAMILIES", "Family", "Tensor", "decoder_config", "find", "hf_config"]

FAMILIES = (
    *(LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, STABLELM),
    *(GPT2, OPT, GPTJ, NEOX, MPT, BLOOM, FALCON),
)


def find(hf_config: dict[str, Any], where: str) -> Family:
    """The family of a config.json, by its `architectures`, or by its `model_type` where it has none."""
    architectures = hf_config.get("architectures") or []
    if not isinstance(architectures, list):
        raise UserError(f"{where}: architectures: {architectures!r} should be a list of names")
    model_type = hf_config.get("model_type")
    for family in FAMILIES:
        if architectures and architectures[0] in (family.architecture, *family.aliases):
            return family
        if not architectures and model_type == family.model_type:
            return family
    found = f"architecture {architectures[0]}" if architectures else f"model_type {model_type!r}"
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(f"{where}: {found} is not supported; supported: {supported}")


def decoder_config(hf_config: dict[str, Any], where: str = "config.json") -> DecoderConfig:
    """What a Hugging Face configuration means; UserError, naming key and value, for what is not implemented."""
    family = find(hf_config, where)
    keys = Keys(hf_config, where, family.architecture)
    keys.only("quantization_config")
    keys.only("is_causal", True)
    return family.read(keys)


def hf_config(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    """A Hugging Face configuration of the given family, the inverse of `decoder_config`.

    Raises UserError where the family cannot express the configuration.
    """
    family = find({"model_type": model_type}, "model_type")
    values = {"architectures": [family.architecture], "model_type": model_type, **family.keys_of(config)}
    back = decoder_config(values, f"{family.architecture}'s configuration")
    for key, value in vars(config).items():
        if getattr(back, key) != value:
            raise UserError(
                f"{key}: {family.architecture} cannot express {value!r} (it would be {getattr(back, key)!r})"
            )
    return values
