"""Models with random weights, for measuring shapes of which there are no weights at hand.

A shape is WIDTHxLAYERSxVOCAB, a Llama with heads of 64 features, or the path of any model's config.json, or of its
folder.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fusejax import export, models
from fusejax.errors import UserError
from fusejax.models import files


def add_argument(parser: Any, place: str) -> None:
    """`--random SHAPE`; place: whose place the model takes, in words."""
    parser.add_argument(
        "--random",
        metavar="SHAPE",
        help=f"a model with random weights in {place} place: a Llama of WIDTHxLAYERSxVOCAB, for example 320x8x32000, "
        "or the config.json of any model",
    )


def write(shape: str, folder: Path, seed: int, tokenizer_from: Path | None, length: int) -> Path:
    """A model of this shape as a Hugging Face folder, `folder`/model.

    tokenizer_from: the model whose tokenizer goes along, and needs so many rows of the embedding. length: tokens of a
    sequence, for which there must be positions. Raises UserError where the shape is none, or too small.
    """
    values, config = _read(shape, length)
    if tokenizer_from is not None:
        least = models.read_config(tokenizer_from)[1].vocab_size
        if config.vocab_size < least:
            raise UserError(
                f"--random {shape}: the tokenizer of {tokenizer_from} needs a vocabulary of at least {least}"
            )
    if config.learned_positions and config.learned_positions - config.position_offset < length:
        raise UserError(f"--random {shape}: has positions for fewer than max_length = {length} tokens")
    return export.save(models.init(config, seed), values, folder / "model", tokenizer_from=tokenizer_from)


def _read(shape: str, length: int) -> tuple[dict[str, Any], models.DecoderConfig]:
    parts = shape.split("x")
    if len(parts) == 3 and all(part.isdigit() and int(part) for part in parts):
        config = replace(_llama(shape, *map(int, parts)), max_length=length)
        return models.hf_config(config, "llama"), config
    path = Path(shape).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if "/" in shape and not path.is_file():
        raise UserError(
            f"--random {shape}: {path} is not there; it should be the config.json of a model, or its folder"
        )
    if not path.is_file():
        raise UserError(f"--random {shape}: should be WIDTHxLAYERSxVOCAB, for example 320x8x32000, or a config.json")
    values = files.read_json(path)
    return values, models.decoder_config(values, str(path))


def _llama(shape: str, width: int, layers: int, vocab: int) -> models.DecoderConfig:
    if width % 64:
        raise UserError(f"--random {shape}: the width should be a multiple of 64, a head's features")
    heads = width // 64
    return models.DecoderConfig(
        vocab_size=vocab, d_model=width, n_layers=layers, n_heads=heads, n_kv_heads=heads, head_dim=64,
        d_mlp=-(-width * 8 // 3 // 32) * 32, max_length=0, rotary_dim=64, tied=True,
    )  # fmt: skip
