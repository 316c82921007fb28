"""What a family's table is made of: keys of config.json, tensors on disk, and the pieces that families share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fusejax.models.config import DecoderConfig
from fusejax.models.keys import ACTIVATION_NAMES, Keys

Values = dict[str, Any]  # fields of a DecoderConfig


@dataclass(frozen=True)
class Key:
    """A key of config.json and the fields of a `DecoderConfig` that have its value.

    kind: `size` (a whole number above 0), `number`, `positive`, `flag`, `activation`, or, with null for None,
    `optional` (a number above 0) and `window` (a whole one).
    default: what a missing key means, or a function of the fields read before; a `size` without one must be there.
    """

    name: str
    fields: str | tuple[str, ...]
    kind: Literal["size", "number", "positive", "flag", "activation", "optional", "window"] = "size"
    default: Any = None

    def read(self, keys: Keys, values: Values) -> Any:
        default = self.default(values) if callable(self.default) else self.default
        return getattr(keys, self.kind)(self.name, default)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.fields,) if isinstance(self.fields, str) else self.fields


@dataclass(frozen=True)
class Tensor:
    """A tensor on disk and the parameter, or parameters, that it holds.

    `name` may contain `{i}`, the layer, and `{j}`, an entry of the parameters' first dimension (an expert, a head)
    that is a tensor of its own. `params` are paths in the decoder; several of them lie joined along the first
    dimension, in `groups` rounds of a part of each. A tensor with n_in >= 1 is a matrix [outputs, inputs] whose
    parameter has its inputs in its first `n_in` dimensions; with n_in 0 it has the parameter's elements in the
    parameter's order, as rows (an `embedding`) or flattened (a norm or a bias).
    """

    name: str
    params: tuple[str, ...]
    n_in: int = 0
    embedding: bool = False
    groups: int = 1
    transposed: bool = False  # the matrix is [inputs, outputs] on disk
    stacked: bool = False  # tensor and parameters have one more dimension in front (experts)
    aliases: tuple[str, ...] = ()  # other names under which checkpoints hold it
    copies: tuple[str, ...] = ()  # names under which a tied checkpoint may hold it once more


@dataclass(frozen=True)
class Family:
    """A family's table."""

    architecture: str  # transformers' class name, written to config.json
    model_type: str
    keys: tuple[Key, ...]
    tensors: Callable[[DecoderConfig], Iterator[Tensor]]
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields that are the same in the whole family
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # switches and the values that we implement
    derive: Callable[[Keys, Values], Values] = lambda keys, values: {}  # fields that take more than one key
    write: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}  # the keys of those fields
    other_tensors: Callable[[DecoderConfig], Iterator[Tensor]] | None = None  # another layout of published checkpoints
    ignored: tuple[str, ...] = ()  # regular expressions: tensors that hold no parameter (buffers)
    aliases: tuple[str, ...] = ()  # other names of the architecture
    synonyms: Mapping[str, str] = field(default_factory=dict)  # other names of keys that transformers reads too
    # Switches of ours that transformers' own class of this family silently leaves out.
    unknown_to_transformers: Callable[[DecoderConfig], list[str]] = lambda config: []

    def read(self, keys: Keys) -> DecoderConfig:
        """The configuration; UserError, naming key and value, for what is not implemented."""
        keys = keys.under_own_names(self.synonyms)
        for name, supported in self.only.items():
            keys.only(name, *supported)
        values: Values = dict(self.fixed)
        for key in self.keys:
            value = key.read(keys, values)
            values |= dict.fromkeys(key.targets, value)
        values |= self.derive(keys, values)
        if values["n_heads"] % values.setdefault("n_kv_heads", values["n_heads"]):
            keys.refuse("num_key_value_heads", values["n_kv_heads"], f"a divisor of {values['n_heads']} heads")
        if keys.get("head_dim") not in (None, values["head_dim"]):
            keys.refuse("head_dim", keys.get("head_dim"), str(values["head_dim"]))
        if values.get("rotary_dim", 0) % 2:
            keys.refuse("rotary_dim", values["rotary_dim"], "an even number of rotated features")
        return DecoderConfig(**values)

    def keys_of(self, config: DecoderConfig) -> dict[str, Any]:
        """config.json's keys for a configuration, the inverse of `read` where the family can express it."""
        values = {key.name: getattr(config, key.targets[0]) for key in self.keys}
        for key in self.keys:
            if key.kind == "activation":
                values[key.name] = ACTIVATION_NAMES[config.activation][0]
        return values | self.write(config)


def linear(name: str, param: str, bias: bool, n_in: int = 1, transposed: bool = False) -> Iterator[Tensor]:
    """A linear layer's weight, and its bias where there is one."""
    yield Tensor(f"{name}.weight", (f"{param}.kernel",), n_in, transposed=transposed)
    if bias:
        yield Tensor(f"{name}.bias", (f"{param}.bias",))


def norm(name: str, param: str, bias: bool = False) -> Iterator[Tensor]:
    """A norm's weight, and its bias where there is one."""
    yield Tensor(f"{name}.weight", (f"{param}.scale",))
    if bias:
        yield Tensor(f"{name}.bias", (f"{param}.bias",))


def fused_qkv(name: str, bias: bool, groups: int = 1, transposed: bool = False) -> Iterator[Tensor]:
    """Queries, keys and values in one linear layer: for each of `groups`, its queries, its keys, its values."""
    for suffix, leaf, n_in in (("weight", "kernel", 1), ("bias", "bias", 0))[: 2 if bias else 1]:
        params = tuple(f"blocks.attention.{part}.{leaf}" for part in ("query", "key", "value"))
        yield Tensor(f"{name}.{suffix}", params, n_in, groups=groups, transposed=transposed and n_in > 0)


def embeddings(c: DecoderConfig, name: str, output: str, *aliases: str) -> Iterator[Tensor]:
    """The embedding, and the unembedding unless it is the same tensor."""
    copies = (output, *aliases) if c.tied else ()
    yield Tensor(name, ("embedding",), embedding=True, copies=copies)
    if not c.tied:
        yield Tensor(output, ("output",), n_in=1, aliases=aliases)


def head_dim(keys: Keys, values: Values, name: str | None = None) -> int:
    """Features of a head: the key's, or the model's width divided by the heads."""
    if name and keys.get(name) is not None:
        return keys.size(name)
    return keys.heads(values["d_model"], values["n_heads"])


def windows(keys: Keys, values: Values, pattern: Callable[[int], bool]) -> Values:
    """`window_layers` from `layer_types`, or where that is missing from pattern(layer, from 0)."""
    kinds = {"sliding_attention": True, "full_attention": False}
    types = keys.get("layer_types")
    if types is None:
        layers = tuple(pattern(i) for i in range(values["n_layers"]))
    else:
        if not isinstance(types, list) or len(types) != values["n_layers"] or not set(types) <= kinds.keys():
            keys.refuse("layer_types", types, f"{values['n_layers']} of {' and '.join(kinds)}")
        layers = tuple(kinds[kind] for kind in types)
    if values["window"] is None or not any(layers):
        return {"window": None, "window_layers": ()}
    return {"window_layers": () if all(layers) else layers}


def layer_types(c: DecoderConfig) -> list[str]:
    """The inverse of `windows`."""
    return ["sliding_attention" if has_window else "full_attention" for has_window in c.has_window]
