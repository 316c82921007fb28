"""Reading a config.json: every mistake is one line that names the file, the key and its value."""

import math
from collections.abc import Mapping
from typing import Any

from fusejax.errors import UserError
from fusejax.models.config import DecoderConfig, RopeScaling

# Hugging Face's names of activations, the first of each being the one we write.
ACTIVATION_NAMES = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"),
    "relu": ("relu",),
}


class Keys:
    """The keys of one config.json, or of a section of it, for an architecture's reader."""

    def __init__(self, values: dict[str, Any], where: str, architecture: str):
        self.values, self.where, self.architecture = values, where, architecture

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def inside(self, key: str) -> "Keys":
        """The keys of a section, which may be missing."""
        section = self.get(key, {})
        if not isinstance(section, dict):
            raise UserError(f"{self.where}: {key}: {section!r} should be a section of keys and values")
        return Keys(section, f"{self.where}: {key}", self.architecture)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.get(key, default)
        if value is None:
            raise UserError(f"{self.where}: the key {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.where}: {key}: {value!r} should be a whole number above 0")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{self.where}: {key}: {value!r} should be a number")
        return float(value)

    def positive(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.number(key, default)
        if value <= 0:
            raise UserError(f"{self.where}: {key}: {value!r} should be a number above 0")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of so many numbers."""
        value = self.get(key)
        right = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
        if not right or len(value) != count:
            raise UserError(f"{self.where}: {key}: {value!r} should be a list of {count} numbers")
        return tuple(float(x) for x in value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key}: {value!r} should be true or false")
        return value

    def only(self, key: str, *supported: Any) -> None:
        """Refuse any other value; a missing key is right."""
        value = self.get(key)
        if value is not None and value not in supported:
            wanted = " or ".join(repr(choice) for choice in supported) or "null"
            self.refuse(key, value, wanted)

    def refuse(self, key: str, value: Any, wanted: str) -> None:
        raise UserError(f"{self.where}: {key}: {value!r} is not supported for {self.architecture}; supported: {wanted}")

    def activation(self, key: str, default: str) -> str:
        value = self.get(key, default)
        for ours, names in ACTIVATION_NAMES.items():
            if value in names:
                return ours
        known = ", ".join(name for group in ACTIVATION_NAMES.values() for name in group)
        raise UserError(f"{self.where}: {key}: {value!r} is not supported; supported: {known}")

    def optional(self, key: str, default: float | None) -> float | None:
        """A number above 0, or None where the key is null; a whole one stays whole."""
        if key in self.values and self.values[key] is None:
            return None
        if default is None and self.get(key) is None:
            return None
        value = self.positive(key, default or 0.0)
        return int(value) if value.is_integer() else value

    def window(self, key: str, default: int | None) -> int | None:
        """A whole number above 0, or None where the key is null."""
        return None if self.optional(key, default) is None else self.size(key, default)

    def under_own_names(self, synonyms: Mapping[str, str]) -> "Keys":
        """These keys, each synonym (a key of `synonyms`) under the name that the family reads."""
        found = {}
        for other, name in synonyms.items():
            value, own = self.get(other), self.get(name)
            if value is not None and own is not None and value != own:
                self.refuse(other, value, f"{own!r}, the same as {name}")
            if value is not None:
                found[name] = value
        return self.replaced(**found)

    def replaced(self, **values: Any) -> "Keys":
        """These keys with other values, or with one that is missing."""
        return Keys(self.values | values, self.where, self.architecture)

    def with_default(self, key: str, default: Any) -> "Keys":
        return self if self.get(key) is not None else self.replaced(**{key: default})

    def rope(
        self,
        head_dim: int,
        max_length: int,
        theta: float = 10000.0,
        fraction: float = 1.0,
        theta_key: str = "rope_theta",
        fraction_key: str = "partial_rotary_factor",
    ) -> dict[str, Any]:
        """`rotary_dim`, `rope_theta` and `rope_scaling`, from `rope_parameters`, `rope_scaling` or the older keys."""
        name = "rope_scaling" if self.get("rope_scaling") else "rope_parameters"
        section = self.inside(name)
        for key, value in section.values.items():
            if isinstance(value, dict):
                section.refuse(key, value, "one set of rope parameters for all layers")
        theta = section.positive("rope_theta", self.positive(theta_key, theta))
        fraction = section.number("partial_rotary_factor", self.number(fraction_key, fraction))
        dim = int(head_dim * fraction)
        if dim % 2 or not 0 < dim <= head_dim:
            if fraction == 1:
                raise UserError(
                    f"{self.where}: its heads have {head_dim} features each; rotary positions need an even number"
                )
            self.refuse(fraction_key, fraction, f"an even number of each head's {head_dim} features")
        original = self.get("original_max_position_embeddings", section.get("original_max_position_embeddings"))
        scaling = _rope_scaling(section, dim, max_length, original)
        return {"rotary_dim": dim, "rope_theta": theta, "rope_scaling": scaling}

    def heads(self, d_model: int, n_heads: int) -> int:
        """Features of a head where they share the model's width."""
        if d_model % n_heads:
            raise UserError(f"{self.where}: a width of {d_model} does not divide into {n_heads} attention heads")
        return d_model // n_heads


def _rope_scaling(keys: Keys, rotary_dim: int, max_length: int, original: Any) -> RopeScaling | None:
    """The scaling that a section `rope_parameters` or `rope_scaling` describes (transformers' names)."""
    kind = keys.get("rope_type", keys.get("type", "default"))
    if kind == "default":
        return None
    if kind == "su":  # longrope's first name
        kind = "longrope"
    if kind not in ("linear", "dynamic", "yarn", "llama3", "longrope"):
        keys.refuse("rope_type", kind, "default, linear, dynamic, yarn, llama3, longrope")
    if kind in ("linear", "dynamic"):
        original = max_length
    if kind == "dynamic" and rotary_dim == 2:
        keys.refuse("rope_type", kind, "dynamic where more than 2 features of a head are rotated")
    length = max_length if original is None else original
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise UserError(f"{keys.where}: original_max_position_embeddings: {length!r} should be a whole number above 1")
    if kind not in ("yarn", "longrope") and keys.get("factor") is None:
        raise UserError(f"{keys.where}: the key factor is missing")
    factor = keys.positive("factor", max_length / length)
    values: dict[str, Any] = {"kind": kind, "factor": factor, "original_length": length}
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            if keys.get(key) is None:
                raise UserError(f"{keys.where}: the key {key} is missing")
            values[key] = keys.positive(key, 0.0)
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            keys.refuse("high_freq_factor", values["high_freq_factor"], "a number above low_freq_factor")
    if kind == "yarn":
        values |= {"beta_fast": keys.number("beta_fast", 32.0), "beta_slow": keys.number("beta_slow", 1.0)}
        values |= {"truncate": keys.flag("truncate", True), "attention_factor": _yarn_attention(keys, factor)}
    if kind == "longrope":
        grown = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
        values["attention_factor"] = keys.number("attention_factor", grown)
        for key in ("short_factor", "long_factor"):
            values[f"{key}s"] = keys.numbers(key, rotary_dim // 2)
    return RopeScaling(**values)


def _yarn_attention(keys: Keys, factor: float) -> float:
    """The factor of cos and sin (YaRN, Peng et al. 2023, section 3.4; with DeepSeek's two scales)."""

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale, all_dim = keys.number("mscale", 0.0), keys.number("mscale_all_dim", 0.0)
    return keys.number("attention_factor", grown(scale) / grown(all_dim) if scale and all_dim else grown(1.0))


def write_rope(c: DecoderConfig) -> dict[str, Any]:
    """config.json's keys for rotary positions, those that every version of transformers reads."""
    s = c.rope_scaling
    if s is None:
        return {"rope_theta": c.rope_theta}
    values: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind not in ("linear", "dynamic"):
        values["original_max_position_embeddings"] = s.original_length
    if s.kind in ("yarn", "longrope"):
        values["attention_factor"] = s.attention_factor
    if s.kind == "yarn":
        values |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
    if s.kind == "llama3":
        values |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "longrope":
        values |= {"short_factor": list(s.short_factors), "long_factor": list(s.long_factors)}
    return {"rope_theta": c.rope_theta, "rope_scaling": values}
