"""Generation: prompts of different lengths together, with a cache of keys and values.

    fusejax.generate("path/or/hub-name", "Once upon a time", max_tokens=64)

Prompts are padded on the left to one of a few lengths, so that all rows write their next token to the same place of the
cache and programs are compiled once for many prompts: one reads the prompts, one adds a token.
Shapes: B prompts, P tokens of the longest, S places in the cache, V rows of the vocabulary.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusejax import tokenizer_files
from fusejax.errors import UserError
from fusejax.models import files
from fusejax.models.config import check_ids
from fusejax.models.decoder import Cache, Decoder
from fusejax.models.texts import TextStream
from fusejax.options import flag
from fusejax.progress import warn
from fusejax.tokenizers import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: first the temperature, then `top_k`, then `top_p`.

    temperature 0 takes the most probable token. top_k: only the k most probable, 0 for all. top_p: only the most
    probable whose probabilities together first reach p (nucleus sampling, Holtzman et al. 2020, section 3.1).
    Equal seeds give equal tokens; a row's tokens depend on its own prompt and number alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, right, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "a number from 0 on"),
            ("top_k", self.top_k >= 0, "a whole number from 0 on"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2^32 - 1"),
        ):
            if not right:
                raise UserError(f"{name}: {getattr(self, name)} should be {wanted}")


class _Choice(NamedTuple):
    """A `Sampling` as arrays, so that other values are no other program."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    keys: jax.Array  # one random key per row


def keep(logits_BV: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> Any:
    """(logits / temperature, sorted descending, -inf for those that are not drawn from; their ids), [B, V] each."""
    ids_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, ids_BV, axis=-1) / temperature
    rank_V = jnp.arange(logits_BV.shape[-1])
    sorted_BV = jnp.where((top_k == 0) | (rank_V < top_k), sorted_BV, -jnp.inf)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    kept_BV = (top_p >= 1) | (before_BV < top_p) | (rank_V == 0)
    return jnp.where(kept_BV, sorted_BV, -jnp.inf), ids_BV


def _choose(model: Decoder, hidden_BH: jax.Array, n: jax.Array, choice: _Choice | None, rows: int) -> jax.Array:
    """The next token of each row, int32 [B], its n-th; −1 where the logits are no numbers. choice None: the most
    probable."""
    logits_BV = model.logits(hidden_BH)[:, :rows]
    if choice is None:
        chosen_B = jnp.argmax(logits_BV, axis=-1)
    else:
        sorted_BV, ids_BV = keep(logits_BV, choice.temperature, choice.top_k, choice.top_p)
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(choice.keys, n)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, sorted_BV)
        chosen_B = jnp.take_along_axis(ids_BV, drawn_B[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isnan(logits_BV).any(-1), -1, chosen_B).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _start(
    graphdef: Any, rows: int, size: int, params: Any, ids_BP: jax.Array, segments_BP: jax.Array, choice: _Choice | None
) -> tuple[jax.Array, Cache]:
    """(the first token of each row, the cache) of the prompts."""
    model = nnx.merge(graphdef, params)
    positions_BP = jnp.maximum(jnp.cumsum(segments_BP, axis=1) - 1, 0)
    hidden_BPH, cache = model.prefill(ids_BP, segments_BP, positions_BP, size)
    return _choose(model, hidden_BPH[:, -1], jnp.int32(0), choice, rows), cache


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _next(
    graphdef: Any, rows: int, params: Any, tokens_B: jax.Array, cache: Cache, n: jax.Array, choice: _Choice | None
) -> tuple[jax.Array, Cache]:
    """(the next token of each row, the cache with `tokens_B` in it)."""
    model = nnx.merge(graphdef, params)
    hidden_B1H, cache = model.decode(tokens_B[:, None], cache)
    return _choose(model, hidden_B1H[:, -1], n, choice, rows), cache


_MOST_TOKENS = 1 << 20


def _bucket(n: int) -> int:
    """A length of at least n, one of few: at most a quarter longer from 32 on."""
    step = max(8, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = Sampling(),
    vocab_size: int | None = None,
) -> Iterator[np.ndarray]:
    """The tokens that follow each prompt, one for every prompt at a time: int32 [B], `max_tokens` times.

    prompts: token ids, at least one each. vocab_size: only ids below it are chosen (a padded embedding has more rows).
    A token is computed while the one before it is looked at. Raises UserError for an empty prompt, a token id that the
    model does not know, where its table of positions ends before the last token, and where its values are not numbers.
    """
    _check_limits(max_tokens)
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise UserError("prompt: it has no tokens; this tokenizer has no BOS token to begin with")
    limit = model.config.learned_positions - model.config.position_offset
    if model.config.learned_positions and max(lengths) + max_tokens > limit:
        raise UserError(
            f"max_tokens: a prompt of {max(lengths)} tokens and {max_tokens} more are beyond the model's {limit} "
            "positions"
        )
    if max(lengths) + max_tokens > model.config.max_length:
        warn(
            f"max_tokens: a prompt of {max(lengths)} tokens and {max_tokens} more go beyond the "
            f"{model.config.max_length} that the model was made for; it may do worse there"
        )
    longest = _bucket(max(lengths))
    ids_BP = np.zeros((len(prompts), longest), np.int32)
    segments_BP = np.zeros_like(ids_BP)
    for row, prompt in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt {row + 1}"
        check_ids(prompt, model.config.vocab_size, where)
        ids_BP[row, longest - len(prompt) :] = prompt
        segments_BP[row, longest - len(prompt) :] = 1
    rows = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    choice = None
    if sampling.temperature > 0:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(sampling.seed), jnp.arange(len(prompts)))
        values = (jnp.float32(sampling.temperature), jnp.int32(min(sampling.top_k, rows)), jnp.float32(sampling.top_p))
        choice = _Choice(*values, keys)
    graphdef, params = nnx.split(model)
    now, cache = _start(graphdef, rows, _bucket(longest + max_tokens), params, ids_BP, segments_BP, choice)
    for n in range(1, max_tokens):
        later, cache = _next(graphdef, rows, params, now, cache, jnp.int32(n), choice)
        yield _numbers(now)
        now = later
    yield _numbers(now)


def _check_limits(max_tokens: int, stop: Sequence[str] = ()) -> None:
    """UserError for what no model can do."""
    if max_tokens < 1:
        raise UserError(f"max_tokens: {max_tokens} should be a whole number above 0")
    if max_tokens > _MOST_TOKENS:
        raise UserError(f"max_tokens: {max_tokens} is more than {_MOST_TOKENS}, for which no cache is made at once")
    if "" in stop:
        raise UserError("stop: an empty string would stop everything")


def _check_prompts(prompts: Sequence[str]) -> None:
    """UserError for what is no text: bytes of a command line that are not UTF-8 come as halves of surrogate pairs."""
    for number, prompt in enumerate(prompts, 1):
        where = "prompt" if len(prompts) == 1 else f"prompt {number}"
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(prompt[error.start])
            found = f"0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else "half a surrogate pair"
            raise UserError(f"{where}: not UTF-8 (character {error.start}: {found})") from None


def _numbers(tokens_B: jax.Array) -> np.ndarray:
    tokens = np.asarray(tokens_B)
    if (tokens < 0).any():
        raise UserError("the model gives values that are not numbers; its weights are damaged, or need float32")
    return tokens


def eos_ids(folder: Path, tokenizer: Tokenizer, rows: int) -> frozenset[int]:
    """The tokens that end a text: of generation_config.json, else of config.json, else the tokenizer's EOS.

    rows: of the model's embedding; an id that is no token, so that no text can end with it, is a warning.
    """
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = files.read_json(path).get("eos_token_id") if path.exists() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise UserError(f"{path}: eos_token_id: {found!r} should be a token id, or a list of them")
            known = min(rows, tokenizer.vocab_size)
            for i in ids:
                if not 0 <= i < known:
                    warn(f"{path}: eos_token_id: {i} is none of the model's {known} tokens; no text ends with it")
            return frozenset(ids)
    return frozenset(() if tokenizer.eos_id is None else (tokenizer.eos_id,))


class Generator:
    """A model with its tokenizer, ready to continue texts.

    ends: ids of the tokens that end a text; default: the tokenizer's EOS. Special tokens that are written in a prompt
    ('<|im_start|>') are those tokens where the tokenizer was loaded with `split_special=False`.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, ends: frozenset[int] | None = None):
        self.model, self.tokenizer = model, tokenizer
        default = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.ends = frozenset(default) if ends is None else ends

    @classmethod
    def load(cls, path_or_repo: str | Path, revision: str | None = None, **options: Any) -> "Generator":
        """That of a folder or a hub name; the options are those of `fusejax.load`."""
        from fusejax import models

        tokenizer_files.require_name(str(path_or_repo))
        folder = files.local_folder(path_or_repo, revision)
        tokenizer = Tokenizer.load(str(folder), split_special=False)
        model = models.load(folder, **options)
        return cls(model, tokenizer, eos_ids(folder, tokenizer, model.config.vocab_size))

    def __call__(
        self,
        prompts: Sequence[str],
        max_tokens: int = 128,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
        show: Callable[[int, str], None] = lambda row, text: None,
    ) -> list[str]:
        """The text that follows each prompt, up to an end, a string of `stop` (left out) or `max_tokens` tokens.

        show(row, text): called with each new piece of text as soon as no stop string can begin in it.
        """
        _check_limits(max_tokens, stop)
        _check_prompts(prompts)
        front = [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []
        ids = [[*front, *encoded.tolist()] for encoded, _ in self.tokenizer.encode_batch(prompts)]
        streams = [TextStream(self.tokenizer.canonical_bytes, self.ends, stop) for _ in prompts]

        def add(row: int, piece: str) -> None:
            if piece:
                show(row, piece)

        for now in tokens(self.model, ids, max_tokens, sampling, self.tokenizer.vocab_size):
            for row, stream in enumerate(streams):
                add(row, stream.push(int(now[row])))
            if all(stream.done for stream in streams):
                break
        for row, stream in enumerate(streams):
            add(row, stream.close())
        return [stream.text for stream in streams]


def generate(
    model: Generator | str | Path,
    prompts: str | Sequence[str],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> str | list[str]:
    """The text that follows a prompt (a string), or each of several, without the prompt.

    model: a folder, a hub name or, to load it once for many calls, a `Generator`. temperature, top_k, top_p, seed: see
    `Sampling`. stop: the text ends before the first of these strings. Raises UserError for values that make no sense.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    _check_limits(max_tokens, stop)
    generator = model if isinstance(model, Generator) else Generator.load(model)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    results = generator(texts, max_tokens, sampling, stop)
    return results[0] if isinstance(prompts, str) else results


@contextlib.contextmanager
def _as_flags() -> Iterator[None]:
    """Messages that begin with a keyword's name begin with the option's: --max-tokens."""
    try:
        yield
    except UserError as error:
        name, colon, rest = str(error).partition(":")
        raise UserError(f"{flag(name)}{colon}{rest}") from None


def show(options: argparse.Namespace) -> None:
    """`fusejax generate`: the text on standard output, as it comes; what loading says goes to standard error."""
    with _as_flags():
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
        _check_limits(options.max_tokens, options.stop)
    try:
        prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    except UnicodeDecodeError as error:
        found = f"byte {error.start}: 0x{error.object[error.start]:02x}"
        raise UserError(f"prompt: standard input is not UTF-8 ({found})") from None
    _check_prompts([prompt])
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the text's alone
        generator = Generator.load(
            options.model, options.revision, dtype=dtype, compute_dtype=dtype, attention=options.attention
        )
    generator([prompt], options.max_tokens, sampling, options.stop, lambda row, text: print(text, end="", flush=True))
    print()
