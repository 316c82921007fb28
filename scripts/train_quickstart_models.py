"""Make the quickstart's four models from nothing: tokenizers, random weights, pretraining, export.

    python scripts/train_quickstart_models.py [--only NAME ...] [--build FOLDER] [--into FOLDER]

Text: the split `train` of `fusejax.stdlib_corpus`. Each model gets a tokenizer of its own, trained on its own
domain with a little of the others, and is then trained by this project's own training (`sources: []`, plain
CLM). The experts see all the training text of their domain several times, the generalist a little of each domain
once; the documents of the splits `fusion` and `heldout` are seen by none. The four together see 7 million tokens,
which took 41 minutes on two cores that had other work as well. An interrupted run goes on where it stopped. Seeds are
fixed; the text depends on the Python version that runs it (the shipped models: CPython 3.11).
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models

from fusejax import cli, config, export, models, outputs
from fusejax.progress import say
from fusejax.stdlib_corpus import DOMAINS, documents

MAX_LENGTH = 256
WIDTH, LAYERS, HEADS = 128, 4, 4
SPACE = "▁"


@dataclass(frozen=True)
class Recipe:
    """How one of the models is made."""

    make_tokenizer: Callable[[list[str]], tuple[Tokenizer, dict[str, str]]]
    hf_config: dict[str, Any]
    domains: tuple[str, ...]
    epochs: int
    learning_rate: float
    limit_bytes: int | None = None  # text of each domain
    seed: int = 0


def sentencepiece_like(texts: list[str]) -> tuple[Tokenizer, dict[str, str]]:
    """As Llama's: a space is '▁', one more stands before the text, what has no token becomes bytes ('<0x0A>').

    Merges are learned inside pieces (words, digits, runs of signs, indentation) and lines; encoding has no pieces,
    as in Llama. Newlines and everything rare are left to the bytes.
    """
    space = normalizers.Replace(" ", SPACE)
    pieces = f"{SPACE}+(?={SPACE}[^{SPACE}])|{SPACE}?[A-Za-z]+|{SPACE}?[0-9]|{SPACE}?[^{SPACE}A-Za-z0-9]+|{SPACE}+"
    tokenizer = Tokenizer(tokenizer_models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = space
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=96,  # ASCII
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.split("\n") if line), trainer)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), space])
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _only_special(tokenizer, 3), {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
    }


def byte_level(texts: list[str], vocab_size: int = 2048, digits: bool = False) -> tuple[Tokenizer, dict[str, str]]:
    """As GPT-2's, GPT-NeoX's and MPT's: BPE over bytes, a space is 'Ġ', a newline 'Ċ'. digits: one token each."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), bytes_]) if digits else bytes_
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = "<|endoftext|>"
    return tokenizer, {"unk_token": end, "bos_token": end, "eos_token": end, "pad_token": "<|padding|>"}


def _only_special(tokenizer: Tokenizer, n: int) -> Tokenizer:
    """The trainer marks the byte tokens special as well; they are text."""
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:n]
    return Tokenizer.from_str(json.dumps(spec))


def llama() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": 352,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": MAX_LENGTH,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
    }


def mpt() -> dict[str, Any]:
    return {
        "model_type": "mpt",
        "architectures": ["MptForCausalLM"],
        "d_model": WIDTH,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "expansion_ratio": 4,
        "max_seq_len": MAX_LENGTH,
        "no_bias": True,
        "attn_config": {"attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": 8},
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
    }


def gpt_neox() -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": MAX_LENGTH,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "layer_norm_eps": 1e-5,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
    }


RECIPES = {
    "llama-generalist": Recipe(sentencepiece_like, llama(), DOMAINS, 1, 3e-3, limit_bytes=400_000, seed=1),
    "llama-code": Recipe(sentencepiece_like, llama(), ("code",), 2, 3e-3, seed=2),
    "mpt-docs": Recipe(byte_level, mpt(), ("docs",), 3, 3e-3, seed=3),
    "neox-unicode": Recipe(
        lambda texts: byte_level(texts, 1500, digits=True), gpt_neox(), ("unicode",), 4, 3e-3, seed=4
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog="train_quickstart_models.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--build", type=Path, default=Path("runs/quickstart-models"), help="where training happens")
    parser.add_argument("--into", type=Path, default=Path("configs/quickstart"), help="where the models go")
    options = parser.parse_args(arguments)
    for name in options.only:
        build(name, RECIPES[name], options.build / name, options.into / name)


def build(name: str, recipe: Recipe, folder: Path, into: Path) -> None:
    """Make one model in `folder` and put it at `into`."""
    untrained = folder / "untrained"
    if not (untrained / "config.json").exists():
        initialise(recipe, untrained)
    job = pretraining(recipe, untrained, folder)
    for stage in ("prepare", "train", "export"):
        cli.stage(stage)(job)
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(folder / "export", into, ignore=shutil.ignore_patterns("fusejax.json"))
    size = sum(file.stat().st_size for file in into.iterdir())
    say(f"{name}: {into}, {size / 1e6:.2f} MB")


def initialise(recipe: Recipe, folder: Path) -> None:
    """The recipe's tokenizer, trained, and a model with random weights."""
    tokenizer, roles = recipe.make_tokenizer(list(tokenizer_texts(recipe.domains)))
    make_model(tokenizer, roles, recipe.hf_config, MAX_LENGTH, recipe.seed, folder)


def make_model(
    tokenizer: Tokenizer, roles: dict[str, str], hf_config: dict[str, Any], max_length: int, seed: int, folder: Path
) -> None:
    """Write a model folder with this tokenizer and random weights."""
    tokenizer_folder = outputs.make_folder(folder.with_name("tokenizer"))
    tokenizer.save(str(tokenizer_folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    (tokenizer_folder / "config.json").write_text("{}", "utf-8")
    # Rows up to the next multiple of 64, as large models have.
    rows = -(-tokenizer.get_vocab_size() // 64) * 64
    ids = {role.replace("_token", "_token_id"): tokenizer.token_to_id(token) for role, token in roles.items()}
    ids.pop("unk_token_id")
    hf_config = {**hf_config, "vocab_size": rows, **ids}
    model = models.init(models.decoder_config(hf_config, str(folder)), seed)
    export.save(model, hf_config, folder, tokenizer_from=tokenizer_folder)


def tokenizer_texts(domains: tuple[str, ...]) -> Iterator[str]:
    """The training text of `domains` (a third of each where it is all of them), and a little of the others."""
    share = 1 / 3 if len(domains) == len(DOMAINS) else 1.0
    for domain, group in groupby(documents("train"), key=lambda document: document.domain):
        texts = [document.text for document in group]
        yield from texts[: int(len(texts) * (share if domain in domains else 0.07))]


def pretraining(recipe: Recipe, model: Path, folder: Path) -> config.Config:
    """The job that trains a model on its domains with plain CLM."""
    return config.validate(
        {
            "target": str(model),
            "sources": [],
            "corpus": {
                "path": "stdlib:",
                "split": "train",
                "domains": list(recipe.domains),
                "limit_bytes": recipe.limit_bytes,
            },
            "max_length": MAX_LENGTH,
            "batch": {"sequences": 8, "epochs": recipe.epochs},
            "optimizer": {"learning_rate": recipe.learning_rate, "warmup_ratio": 0.02, "end_ratio": 0.02},
            "precision": {"compute": "float32", "export": "bfloat16"},
            "checkpoint": {"every": 200, "keep": 1},
            "evaluation": {"clm": False},
            "output": str(folder),
            "seed": recipe.seed,
        },
        where=folder.name,
    )


if __name__ == "__main__":
    cli.run(main)
