"""Small tokenizers of every kind, trained on the spot: what the tests of boundaries and alignment run on."""

import io
import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from fusejax import sentencepiece_model
from fusejax.tokenizers import Tokenizer

TEXTS = [
    "The cat sat on the mat, and the other cats sat on the logs.\n\nThen they checked the checkpoint twice.",
    "def check(point):\n    return point ** 2 + 10\n\n\tfor i in range(1000): print(i, check(i))\n",
    "Ünïcödé naïve café, 中文字符 и русский текст; emoji 😀 👩‍👩‍👧.",
]
MARK = "▁"
SPECIALS = ["<unk>", "<s>", "</s>"]


def byte_level(vocab_size=330, normalizer=None, spaces=False, prefix_space=False):
    """Byte-level BPE as of GPT-2; with NFC and added tokens for runs of spaces as of GPT-NeoX."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    if spaces:
        backend.add_tokens([" " * n for n in range(8, 1, -1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>")


def _marked(text):
    return MARK + text.replace(" ", MARK)


def sentencepiece_bpe(vocab_size=450, bos=True, metaspace=False):
    """BPE with byte fallback and ▁ as of Llama: by normalizers (`Prepend`), or by a Metaspace pre-tokenizer."""
    trained = Backend(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 256, special_tokens=SPECIALS, show_progress=False)
    # Words keep their marker, as in SentencePiece, and merges stay inside words.
    trained.pre_tokenizer = pre_tokenizers.Split(MARK, "merged_with_next")
    trained.train_from_iterator([_marked(text) for text in TEXTS] * 3, trainer)
    spec = json.loads(trained.to_str())
    pieces = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    pieces[len(SPECIALS) : len(SPECIALS)] = [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [tuple(merge) for merge in spec["model"]["merges"]]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(SPECIALS)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def unigram(byte_fallback=False):
    """Unigram with Metaspace; without byte fallback it folds compatibility characters and spaces, and has <unk>."""
    trained = Backend(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    trained.train_from_iterator(TEXTS[:2] * 3, trainer)
    pieces = [tuple(item) for item in json.loads(trained.to_str())["model"]["vocab"]]
    if byte_fallback:
        pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    fallback = [decoders.ByteFallback(), decoders.Fuse()] if byte_fallback else []
    backend.decoder = decoders.Sequence([*fallback, decoders.Metaspace()])
    if not byte_fallback:
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def split_first():
    """Byte-level BPE behind a Split pre-tokenizer as of Llama 3 and Qwen: NFC, digits one by one."""
    wrapped = byte_level(420, normalizers.NFC())
    backend = wrapped.backend_tokenizer
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>")


def wordpiece():
    """WordPiece as of BERT: lower case, no accents, white space lost."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=250, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
    )


def raw_sentencepiece(**options):
    """What fusejax reads from a `tokenizer.model` that the sentencepiece package trained with these options."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(sentencepiece_bytes(**options))
        return sentencepiece_model.load(path, None)


@lru_cache
def sentencepiece_bytes(**options):
    """A SentencePiece model file of a small vocabulary."""
    import sentencepiece

    made = io.BytesIO()
    size = 420 if options.get("byte_fallback") else 150
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.split("\n") if line] * 3),
        model_writer=made, vocab_size=size, hard_vocab_limit=False, minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return made.getvalue()


_MAKERS = {
    "byte-level": byte_level,
    "byte-level coarse": lambda: byte_level(520, spaces=True),
    "byte-level NFC": lambda: byte_level(400, normalizers.NFC(), spaces=True),
    "byte-level prefix space": lambda: byte_level(300, prefix_space=True),
    "sentencepiece": sentencepiece_bpe,
    "sentencepiece coarse": lambda: sentencepiece_bpe(600, bos=False),
    "sentencepiece metaspace": lambda: sentencepiece_bpe(metaspace=True),
    "unigram": unigram,
    "unigram bytes": lambda: unigram(byte_fallback=True),
    "byte-level split": split_first,
    "wordpiece": wordpiece,
    "raw bpe": lambda: raw_sentencepiece(
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
    "raw bpe nmt": lambda: raw_sentencepiece(model_type="bpe", normalization_rule_name="nmt_nfkc"),
    "raw unigram": lambda: raw_sentencepiece(
        model_type="unigram", normalization_rule_name="nfkc", add_dummy_prefix=False
    ),
}
NAMES = list(_MAKERS)
NORMALIZING = ["byte-level NFC", "byte-level split"]
"""They change some of a text."""
LOSSY = ["unigram", "wordpiece", "raw bpe nmt", "raw unigram"]
"""They have no token for some of a text, besides."""
LOSSLESS = [name for name in NAMES if name not in (*NORMALIZING, *LOSSY)]


@lru_cache
def hf(name):
    """The transformers tokenizer."""
    return _MAKERS[name]()


@lru_cache
def tokenizer(name):
    """The fusejax tokenizer."""
    return Tokenizer(hf(name), name=name)


def shared():
    """The folder with fixtures of real models and the reference's outputs, which need not be there."""
    return Path(os.environ.get("FUSEJAX_SHARED") or Path(__file__).resolve().parents[2] / "shared")
