"""Reading a config.json: every mistake is one line that names the file, the key and its value."""

from typing import Any

from fusejax.errors import UserError

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
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.where}: {key}: {value!r} should be a number")
        return float(value)

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

    def rope(self, theta_key: str, fraction_key: str | None, fraction: float) -> tuple[float, float]:
        """(theta, share of each head that is rotated), from `rope_parameters` or from the older keys."""
        theta = self.number(theta_key, 10000.0)
        fraction = self.number(fraction_key, fraction) if fraction_key else fraction
        for section in ("rope_parameters", "rope_scaling"):
            keys = self.inside(section)
            for name in ("rope_type", "type"):
                keys.only(name, "default")
            for name, value in keys.values.items():
                if isinstance(value, dict):
                    keys.refuse(name, value, "one set of rope parameters for all layers")
            theta = keys.number("rope_theta", theta)
            if fraction_key:
                fraction = keys.number("partial_rotary_factor", fraction)
            else:
                keys.only("partial_rotary_factor", 1)
        return theta, fraction

    def heads(self, d_model: int, n_heads: int) -> int:
        """Features of a head where they share the model's width."""
        if d_model % n_heads:
            raise UserError(f"{self.where}: a width of {d_model} does not divide into {n_heads} attention heads")
        return d_model // n_heads
