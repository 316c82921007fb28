"""Layer by layer against transformers' torch class, to find where a new family goes wrong.

    python -m fusejax.models.compare FOLDER

prints, for random ids, the largest difference after the embedding, after each layer, and of the logits, each relative
to the largest value there. The first line that is not near 1e-6 is the place to look at.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusejax import models
from fusejax.errors import UserError
from fusejax.models import attention
from fusejax.models.decoder import Decoder
from fusejax.models.layers import Layer


class Difference(NamedTuple):
    """max |ours - theirs| / max |theirs| at one place of the model."""

    place: str
    value: float


def states(model: Decoder, ids_BL: jax.Array) -> list[tuple[str, jax.Array]]:
    """(place, residual stream [B, L, D]) after the embedding and after each layer."""
    positions = jnp.tile(jnp.arange(ids_BL.shape[1], dtype=jnp.int32), (ids_BL.shape[0], 1))
    hidden = model._embed(ids_BL, positions)
    context = model._context(attention.Tokens.of(positions))
    graphdef, layers = nnx.split(model.blocks)
    found = [("embedding", hidden)]
    for i, has_window in enumerate(model.config.has_window):
        block = nnx.merge(graphdef, jax.tree.map(lambda stacked, i=i: stacked[i], layers))
        hidden, _ = block(hidden, context, Layer(jnp.int32(i + 1), jnp.asarray(has_window)))
        found.append((f"layer {i}", hidden))
    return found


def compare(folder: str | Path, length: int = 32, seed: int = 0) -> list[Difference]:
    """The differences of a model folder, in float32, on two rows of `length` random ids. Needs torch."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError("comparing with transformers' classes needs torch: `pip install torch`") from None

    model = models.load(folder)
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, length))
    with torch.no_grad():
        output = reference.eval()(torch.tensor(ids), output_hidden_states=True, use_cache=False)
    ours = states(model, jnp.asarray(ids))
    theirs = list(output.hidden_states)
    # transformers' last entry is after the final norm; ours is checked by the logits.
    pairs = [(place, x, y) for (place, x), y in zip(ours[:-1], theirs[: len(ours) - 1], strict=True)]
    pairs.append(("logits", model(jnp.asarray(ids)), output.logits))
    return [Difference(place, _relative(np.asarray(x), y.numpy())) for place, x, y in pairs]


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusejax.models.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="a model folder with weights, or a hub name")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row (default 32)")
    options = parser.parse_args(arguments)
    try:
        for place, value in compare(options.folder, options.length):
            print(f"{place:12} {value:.1e}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
