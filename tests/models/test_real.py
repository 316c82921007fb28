"""Published weights, against transformers' torch classes: `make test-real` with FUSEJAX_REAL_MODELS=FOLDER.

The folder holds model folders (SmolLM2-135M and Gemma-3-270M were used); each is compared.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from fusejax import models
from fusejax.models import generate
from fusejax.tokenizers import Tokenizer

FOLDER = os.environ.get("FUSEJAX_REAL_MODELS", "")
PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "def fibonacci(n):\n    ",
    "In 1969, the first human",
    "La recette traditionnelle de la",
    "The three laws of thermodynamics say that",
]
MORE = 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="FUSEJAX_REAL_MODELS names no folder with published models"),
]


def found():
    return sorted(path.parent for path in Path(FOLDER).glob("*/config.json")) if FOLDER else []


@pytest.fixture(scope="module", params=found(), ids=lambda folder: folder.name)
def real(request):
    """(folder, torch's model in float32, torch's greedy continuations of the prompts, one row of ids each)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(str(request.param))
    reference = transformers.AutoModelForCausalLM.from_pretrained(request.param, dtype=torch.float32).eval()
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor(([tokenizer.bos_id] if tokenizer.adds_bos else []) + tokenizer.encode(prompt)[0].tolist())
        with torch.no_grad():
            # Beyond the end of a text too: what follows tells as much about the arithmetic.
            out = reference.generate(
                ids[None], attention_mask=torch.ones_like(ids[None]), do_sample=False, min_new_tokens=MORE,
                max_new_tokens=MORE, eos_token_id=None, pad_token_id=0, repetition_penalty=1.0,
            )  # fmt: skip
        rows.append((len(ids), out[0].tolist()))
    return request.param, reference, rows


def torch_logits(reference, ids):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return reference(torch.tensor(ids)[None], use_cache=False).logits[0].float().numpy()


def our_logits(model, rows):
    forward = jax.jit(lambda model, ids: model(ids))
    longest = max(len(ids) for _, ids in rows)
    for _, ids in rows:
        padded = np.array([ids + [0] * (longest - len(ids))])
        yield np.asarray(forward(model, padded)[0, : len(ids)])


def test_float32(real):
    folder, reference, rows = real
    model = models.load(folder)
    prompts = [ids[:n] for n, ids in rows]
    continued = np.array(list(generate.tokens(model, prompts, MORE))).T
    assert continued.tolist() == [ids[n:] for n, ids in rows]
    worst = 0.0
    for (_, ids), ours in zip(rows, our_logits(model, rows), strict=True):
        theirs = torch_logits(reference, ids)
        worst = max(worst, np.abs(ours - theirs).max() / np.abs(theirs).max())
    print(f"{folder.name}: greedy {MORE} tokens of {len(rows)} prompts equal; max |d logit| {worst:.1e} of max |logit|")
    assert worst <= 1e-3


def test_bfloat16(real):
    """Our bfloat16 is as near to float32 as torch's own."""
    torch = pytest.importorskip("torch")
    folder, reference, rows = real
    model = models.load(folder, dtype="bfloat16", compute_dtype="bfloat16")
    exact = [torch_logits(reference, ids) for _, ids in rows]
    ours = np.mean([np.abs(x - y).mean() for x, y in zip(our_logits(model, rows), exact, strict=True)])
    narrow = reference.to(torch.bfloat16)
    theirs = np.mean([np.abs(torch_logits(narrow, ids) - y).mean() for (_, ids), y in zip(rows, exact, strict=True)])
    reference.float()  # its weights were bfloat16 on disk
    print(f"{folder.name}: mean |d logit| of bfloat16 to float32: ours {ours:.4f}, torch's {theirs:.4f}")
    assert ours <= 1.1 * theirs
