"""The bench command: valid JSON with the promised keys, whatever the sizes; nothing here asserts a time."""

import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fusejax import cli
from fusejax.bench import core
from fusejax.bench import loss as loss_bench
from fusejax.errors import UserError


def run(tmp_path, *arguments):
    path = tmp_path / "bench.json"
    cli.main(["bench", *arguments, "--json", str(path)])
    return json.loads(path.read_text())


def test_loss_writes_cases_and_machine(tmp_path, capsys):
    result = run(tmp_path, "loss", "--tokens", "32", "--hidden", "8", "--vocab", "64", "--top-k", "3", "--repeats", "2")
    assert set(result) == {"cases", "machine"}
    assert {"cpu", "cores", "threads", "jax", "jaxlib", "platform", "device"} <= set(result["machine"])
    by_name = {case["name"]: case for case in result["cases"]}
    for case in by_name.values():
        assert {"name", "value", "unit", "ratio_to", "ratio"} <= set(case)
    fused = by_name["fused, D=8 V=64"]
    assert fused["unit"] == "s"
    assert fused["ratio"] == pytest.approx(fused["value"] / by_name[fused["ratio_to"]]["value"])
    assert fused["spread"][0] <= fused["value"] <= fused["spread"][1]
    assert {"plain, D=8 V=64", "full logits, D=8 V=64"} <= set(fused["ratios"])
    assert by_name["full logits, D=8 V=64: largest array / (T·V)"]["value"] >= 1
    assert "fused, D=8 V=64" in capsys.readouterr().out


def test_a_block_of_logits_counts_whatever_the_width():
    def blocks(hidden, unembedding):  # 4 blocks of 16 tokens
        return sum(jnp.sum(jnp.sort(hidden[i : i + 16] @ unembedding, -1)[:, 0]) for i in range(0, 64, 16))

    jitted = jax.jit(blocks)
    for width in (16, 17, 64):
        arrays = jnp.ones((64, width)), jnp.ones((width, 640))
        share = loss_bench._largest_share(jitted, jitted.lower(*arrays).compile(), arrays)
        assert share == 0.25, width


def test_more_entries_than_tokens_are_refused():
    with pytest.raises(UserError, match=r"^--top-k 10: should be at most --vocab 5$"):
        cli._command(["bench", "loss", "--vocab", "64", "5", "--top-k", "10"])


def test_rounds_are_interleaved_and_warm_up_is_left_out():
    calls = []
    seconds = core.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_medians_ratios_and_rates():
    seconds = {"slow": [4.0, 2.0, 9.0], "fast": [1.0, 3.0, 2.0]}
    slow, fast = core.cases(seconds, {"slow": ["fast", "absent"]})
    assert (slow.value, dict(slow.ratios), fast.ratios) == (4.0, {"fast": 2.0}, {})
    assert slow.spread == (3.0, 6.5)
    rate, _ = core.cases(seconds, unit="tokens/s", amounts={"slow": 8.0, "fast": 1.0})
    assert rate.value == statistics.median([2.0, 4.0, 8 / 9])
    assert core.Case("x", 1.0, "s", {"a": 2.0, "b": 3.0}).as_json() == {
        "name": "x", "value": 1.0, "unit": "s", "ratio_to": "a", "ratio": 2.0, "ratios": {"a": 2.0, "b": 3.0},
    }  # fmt: skip


def test_largest_buffer_and_temporaries():
    compiled = jax.jit(lambda x: jnp.sum(jnp.sort(jnp.outer(x, x), 0))).lower(jnp.zeros(30)).compile()
    assert core.largest_buffer(compiled) == 900
    assert core.largest_buffer(compiled, without={(30, 30)}) == 30
    assert core.temporary_bytes(compiled) >= 900 * 4


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(2.5, "s", "2.5 s"), (0.0123, "s", "12.3 ms"), (4e-6, "s", "4 µs"), (4.56e9, "bytes", "4.56 GB"),
     (7890.4, "tokens/s", "7,890 tokens/s"), (0.25, "", "0.25")],
)  # fmt: skip
def test_values_are_readable(value, unit, text):
    assert core.readable(value, unit) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["los"], "invalid choice: 'los'"),
        (["loss", "--repeats", "0"], "at least 1"),
        (
            ["loss", "--tokens", "8", "--json", "/dev/null/x.json"],
            "x.json: cannot be written (Not a directory)",
        ),
        (["loss", "--vocab", "x"], "'x' should be a whole number"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["bench", *arguments])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_load_measures_memory_beyond_what_stays(tmp_path, tiny_models):
    result = run(tmp_path, "load", "--model", tiny_models["coarse"], "--repeats", "1")
    seconds, rate, beyond = result["cases"]
    assert seconds["unit"] == "s"
    assert rate["value"] == pytest.approx(beyond["checkpoint_bytes"] / 1e9 / seconds["value"])
    assert beyond["bound_bytes"] > beyond["largest_tensor_bytes"] == 352 * 16 * 4
    assert beyond["ratio"] == pytest.approx(beyond["value"] * 1e6 / beyond["bound_bytes"])
