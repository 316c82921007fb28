"""Chat models: conversations by each model's own template, loss and alignment on the assistant's turns alone."""

import json

import numpy as np
import pytest
from conftest import TEXTS, _model
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import fusejax
from fusejax import alignment, config, conversations, corpus, evaluation, report, sources, tokenizers, training
from fusejax.alignment.stage import read_token_table
from fusejax.batches import Batches
from fusejax.errors import UserError
from fusejax.store import Store

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (  # a space of the template stands before what the assistant says, and becomes a part of its first token
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
TAGGED = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
CONVERSATIONS = [
    [("user", "Where did the cat sit?"), ("assistant", "The cat sat on the mat."), ("user", "And the dog?"),
     ("assistant", "The dog sat on the log, 12 times.\nOver the hills.")],
    [("system", "Be brief."), ("user", "assistant"), ("assistant", "user")],
    [("user", "Write code."), ("assistant", "def add(a, b):\n    return a + b"), ("user", "naïve?"),
     ("assistant", "Ünïcödé 😀")],
    [("user", "Who sat?"), ("assistant", "The cat, and the other cat.")],
]  # fmt: skip
MESSAGES = [[{"role": role, "content": text} for role, text in one] for one in CONVERSATIONS]


def save_tokenizer(folder, vocab_size, template, specials):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>", *specials], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([text for texts in TEXTS.values() for text in texts] * 3, trainer)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=specials
    )
    hf.chat_template = template
    hf.save_pretrained(folder)


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    for name, size, template, specials, seed in (
        ("chatml", 330, CHATML, ["<|im_start|>", "<|im_end|>"], 1),
        ("instruct", 290, INSTRUCT, [], 2),
        ("tagged", 330, TAGGED, ["<|im_start|>", "<|im_end|>"], 3),  # chatml's tokens in another template
    ):
        save_tokenizer(folder / name, size, template, specials)
        _model(folder / name, "llama", rows=352, seed=seed, max_length=128)
    return {name: str(folder / name) for name in ("chatml", "instruct", "tagged")}


@pytest.fixture
def make_job(chat_models, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": m, "kind": "x"}) + "\n" for m in MESSAGES))

    def make(**changes):
        values = {
            "target": chat_models["chatml"],
            "sources": [chat_models["chatml"], chat_models["instruct"], chat_models["tagged"]],
            "corpus": {"path": str(path), "messages_key": "messages", "domain_key": "kind"},
            "max_length": 128,
            "cache": {"top_k": 6, "batch_tokens": 512},
            "loss": {"weight_clm": 0.5},
            "optimizer": {"learning_rate": 3e-3},
            "batch": {"sequences": 2, "epochs": 2},
            "precision": {"compute": "float32"},
            "output": str(tmp_path / "job"),
        } | changes
        return config.validate(values)

    return make


def tokenizer_of(chat_models, name):
    return tokenizers.Tokenizer.load(chat_models[name], bos="template")


@pytest.mark.parametrize("name", ["chatml", "instruct", "tagged"])
def test_tokens_and_turns_are_the_templates(chat_models, name):
    """Against transformers: its ids, and its characters of every token."""
    tokenizer = tokenizer_of(chat_models, name)
    hf = PreTrainedTokenizerFast.from_pretrained(chat_models[name])
    for messages in MESSAGES:
        made = conversations.encode(tokenizer, messages)
        text = hf.apply_chat_template(messages, tokenize=False)
        wanted = hf(text, add_special_tokens=False, return_offsets_mapping=True)
        assert made["ids"].tolist() == wanted["input_ids"]
        spoken = [m["content"] for m in messages if m["role"] == "assistant"]
        turns = conversations.turns_of(made)
        assert len(turns) == len(spoken)
        end = "<|im_end|>" if name == "chatml" else "</s>"
        for turn, content in zip(turns, spoken, strict=True):
            assert hf.decode(made["ids"][turn.first : turn.end]).strip() == content
            assert hf.convert_ids_to_tokens(int(made["ids"][turn.stop - 1])) == end
            assert "".join(spoken).encode()[turn.low : turn.high].decode() == content
        assert made["boundaries"][-1] == len("".join(spoken).encode())
        assert (np.diff(made["boundaries"]) >= 0).all()


def test_a_turn_without_an_end_of_its_own_takes_no_others(tmp_path):
    """The end of the user's next turn is not the assistant's."""
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ '</s>' if m['role'] == 'user' }}{% endfor %}"
    )
    save_tokenizer(tmp_path / "model", 280, template, [])
    tokenizer = tokenizers.Tokenizer.load(str(tmp_path / "model"), bos="template")
    for turn in conversations.turns_of(conversations.encode(tokenizer, MESSAGES[0])):
        assert turn.stop == turn.end


def test_tokens_outside_the_assistants_turns_carry_no_loss(make_job, chat_models):
    job = make_job(sources=[])
    corpus.prepare(job)
    hf = PreTrainedTokenizerFast.from_pretrained(chat_models["chatml"])
    batches = Batches(job, with_sources=False)
    seen = []
    for step in range(batches.steps_total // 2):
        batch = batches.batch(step)
        for b, l in zip(*np.nonzero(batch["segment_ids"]), strict=True):
            seen.append((int(batch["segment_ids"][b, l]), int(batch["ids"][b, l]), int(batch["labels"][b, l])))
        for b in range(2):
            for segment in range(1, batch["segment_ids"][b].max() + 1):
                there = batch["segment_ids"][b] == segment
                labels = batch["labels"][b][there]
                said = hf.decode(labels[labels >= 0])
                text = hf.decode(batch["ids"][b][there])
                wanted = [t for one in CONVERSATIONS for role, t in one if role == "assistant" and t in text]
                # What the assistant says and its end, of each turn; nothing of the template, nothing of the others.
                assert said == "".join(t + "<|im_end|>" for t in said.split("<|im_end|>")[:-1])
                assert set(said.split("<|im_end|>")[:-1]) <= set(wanted)
                assert "im_start" not in said
                assert "Where" not in said
    assert len(seen) > 100


def test_the_loss_is_that_of_the_turns_alone(make_job):
    """A step's mean loss equals the model's own log-probabilities of the assistant's tokens, and of nothing else."""
    job = make_job(sources=[], batch={"sequences": 4, "epochs": 1})
    corpus.prepare(job)
    training.run(job)
    model = fusejax.load(job.target.model)
    tokenizer = tokenizers.for_model(job.target)
    nats, count = 0.0, 0
    for messages in MESSAGES:
        made = conversations.encode(tokenizer, messages)
        logits = np.asarray(model(made["ids"][None]))[0].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logprobs -= logits.max(-1, keepdims=True)
        for turn in conversations.turns_of(made):
            for t in range(turn.first, turn.stop):
                nats -= logprobs[t - 1, made["ids"][t]]
                count += 1
    first = json.loads((job.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["tokens"] == count
    assert first["clm_loss"] == pytest.approx(nats / count, rel=1e-4)


def test_rows_meet_at_equal_text_of_equal_turns(make_job, chat_models):
    job = make_job()
    corpus.prepare(job)
    sources.run(job)
    alignment.run(job)
    documents = corpus.documents(job)
    target_tok = tokenizer_of(chat_models, "chatml")
    target = Store(job.folder / "data/train/tokens" / target_tok.fingerprint)
    for name in ("chatml", "instruct", "tagged"):
        source_tok = tokenizer_of(chat_models, name)
        source = Store(job.folder / "data/train/tokens" / source_tok.fingerprint)
        found = merged = 0
        for i in range(len(documents)):
            rows = Store(job.folder / "alignment" / name)[i]["row_map"]
            ours, theirs = target[i], source[i]
            spoken = conversations.text_tokens(ours)
            for t, (row, consumed) in enumerate(rows.tolist()):
                if row < 0:
                    continue
                found += 1
                # The same text was said, but for what is consumed of the source's next token; in the same turn.
                assert ours["boundaries"][t] == theirs["boundaries"][row] + consumed
                [turn] = [k for k, u in enumerate(conversations.turns_of(ours)) if u.first - 1 <= t < u.end]
                u = conversations.turns_of(theirs)[turn]
                assert u.first - 1 <= row < u.end
                if not spoken[t]:  # about to speak: see below
                    assert t == conversations.turns_of(ours)[turn].first - 1
            text = documents[i]["text"].encode()
            pairs = zip(conversations.turns_of(ours), conversations.turns_of(theirs), strict=True)
            for u, v in pairs:  # models about to speak meet where both begin with the turn's first byte
                first = (target_tok, ours["ids"][u.first]), (source_tok, theirs["ids"][v.first])
                clean = all(text.startswith(tok.canonical_bytes[token], u.low) for tok, token in first)
                assert rows[u.first - 1].tolist() == ([v.first - 1, 0] if clean else [-1, 0])
                merged += not clean
            if name == "chatml":
                wanted = np.full(len(rows), -1)
                for u in conversations.turns_of(ours):
                    wanted[u.first - 1 : u.end] = np.arange(u.first - 1, u.end)
                assert rows[:, 0].tolist() == wanted.tolist()
        assert found > 30
        assert (merged > 0) == (name == "instruct")
    # Ends of turns go to ends of turns, whatever they are called.
    table = read_token_table(job.folder / "alignment/instruct").ids[:, 0]
    assert table[tokenizer_of(chat_models, "instruct").eos_id] == target_tok.eos_id
    assert target_tok.shown(target_tok.eos_id) == "<|im_end|>"


@pytest.mark.slow
def test_the_whole_job(make_job, chat_models, tmp_path):
    path = tmp_path / "heldout.jsonl"
    path.write_text(json.dumps({"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "The dog."}]}))
    job = make_job(
        sources=[chat_models["chatml"], chat_models["instruct"]],
        evaluation={"corpus": {"path": str(path), "messages_key": "messages"}, "baselines": ["ensemble"]},
    )
    for stage in (
        corpus.prepare,
        sources.run,
        alignment.run,
        training.run,
        training.export,
        evaluation.run,
        report.run,
    ):
        stage(job)
    found = json.loads((job.folder / "report.json").read_text())
    assert list(found["evaluation"]["bits_per_byte"]) == ["target", "chatml", "instruct", "clm", "ensemble", "fused"]
    assert found["evaluation"]["bits_per_byte"]["target"] == found["evaluation"]["bits_per_byte"]["chatml"]
    counts = json.loads((job.folder / "evaluation/target.json").read_text())["counts"]
    [heldout] = counts.values()
    assert heldout["bytes"] == len("The dog.")
    # Its bits are those of the eight bytes that the assistant says, after all before them.
    tokenizer, model = tokenizers.for_model(job.target), fusejax.load(job.target.model)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The dog."}]
    made = conversations.encode(tokenizer, messages)
    logits = np.asarray(model(made["ids"][None]))[0].astype(np.float64)
    [turn] = conversations.turns_of(made)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -sum(logprobs[t - 1, made["ids"][t]] for t in range(turn.first, turn.end))
    assert heldout["nats"] == pytest.approx(nats, rel=1e-4)
    assert config.validate(job.model_dump(mode="json")) == job
    exported = tokenizers.Tokenizer.load(str(job.folder / "export"), bos="template")
    assert exported.fingerprint == tokenizer.fingerprint


def test_long_conversations_end_with_a_turn_that_fits(make_job, capsys):
    job = make_job(max_length=64)
    corpus.prepare(job)
    documents = corpus.documents(job)
    for i in range(len(documents)):
        messages = conversations.load(documents[i]["conversation"])
        assert messages[-1]["role"] == "assistant"
        assert conversations.spoken(messages) == documents[i]["text"]
    kept = [conversations.load(documents[i]["conversation"]) for i in range(len(documents))]
    assert MESSAGES[0][:2] in kept
    assert MESSAGES[0] not in kept


@pytest.mark.parametrize(("record", "message"), [
    ({"messages": "hello"}, "should be a list of messages"),
    ({"messages": [{"role": "user"}]}, "message 0 should have a text `role` and a text `content`"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no message is the assistant's"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}, "message 1 is empty"),
    ({"text": "x"}, r"no key 'messages' \(corpus.messages_key\)"),
])  # fmt: skip
def test_faults_of_records_are_named(make_job, tmp_path, record, message):
    (tmp_path / "bad.jsonl").write_text(json.dumps(record) + "\n")
    job = make_job(corpus={"path": str(tmp_path / "bad.jsonl"), "messages_key": "messages"})
    with pytest.raises(UserError, match=message) as raised:
        corpus.prepare(job)
    assert "bad.jsonl:1" in str(raised.value)


@pytest.mark.parametrize(("template", "message"), [
    (None, "has no chat template"),
    ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "changes what the assistant says"),
    ("{{ raise_exception('no system role') }}", "its chat template refuses a conversation .*no system role"),
    ("{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}{% endfor %}", "leaves out a turn"),
])  # fmt: skip
def test_faults_of_templates_are_named(tmp_path, template, message):
    save_tokenizer(tmp_path / "model", 280, template, [])
    with pytest.raises(UserError, match=message):
        tokenizers.Tokenizer.load(str(tmp_path / "model"), bos="template")


@pytest.mark.parametrize(("changes", "message"), [
    ({"compat": "fusellm"}, "compat: not used with conversations"),
    ({"fusion": {"ce_unit": "token"}}, "fusion.ce_unit: 'token': not used with conversations"),
    ({"evaluation": {"corpus": {"path": "x"}}}, "evaluation.corpus.messages_key: should be set"),
    ({"target": {"model": "a", "bos": "never"}, "sources": []}, "bos 'template' belongs to corpus.messages_key"),
    ({"corpus": {"path": "x"}, "target": {"model": "a", "bos": "template"}, "sources": []}, "bos 'template' belongs"),
])  # fmt: skip
def test_mistakes_of_settings_are_one_clear_line(make_job, changes, message):
    with pytest.raises(UserError, match=message):
        make_job(**changes)
