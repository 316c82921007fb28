import pytest
import yaml

from fusejax import config
from fusejax.errors import UserError

MINIMAL = "target: a/b\nsources: [a/b, {model: c/d, name: e}]\ncorpus: {path: x}\n"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(MINIMAL)
    return file


def test_defaults_are_the_papers(path):
    c = config.load(path)
    assert (c.loss.weight_clm, c.cache.top_k, c.max_length, c.batch.sequences) == (0.9, 10, 2048, 128)
    assert (c.optimizer.learning_rate, c.optimizer.warmup_ratio, c.optimizer.weight_decay) == (
        1e-5,
        0.008,
        0.1,
    )
    assert c.output == "runs/job"
    assert [s.label for s in c.sources] == ["b", "e"]


def test_a_colon_at_the_end_is_no_mapping(path):
    assert config.load(path, ["corpus.path=stdlib:"]).corpus.path == "stdlib:"


def test_overrides(path):
    c = config.load(
        path,
        ["optimizer.learning_rate=1e-4", "sources.1.name=z", "target.name=t", "output=o", "sources.0.name=q"],
    )
    assert c.optimizer.learning_rate == 1e-4
    assert [s.label for s in c.sources] == ["q", "z"]
    assert (c.target.model, c.target.name, c.output) == ("a/b", "t", "o")


@pytest.mark.parametrize("overrides", [[], ["compat=fusellm"], ["fusion={level: token, window: 4}"]])
def test_dump_round_trips(path, overrides):
    c = config.load(path, overrides)
    assert config.validate(yaml.safe_load(config.dump(c))) == c


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", "did you mean optimizer.learning_rate"),
        ("sources.0.modle=1", "did you mean sources.0.model"),
        ("zzzz=1", "known here: target"),
        ("evaluation.corpus.pth=3", "did you mean evaluation.corpus.path"),
        ("batch.sequences=0", r"batch.sequences: .*greater than or equal to 1 \(got 0\)"),
        ("fusion.kind=x", "'min_ce', 'avg_ce', 'fixed' or 'pairwise'"),
        ("fusion.weights=[1, 2]", "only used with"),
        ("fusion.kind=fixed", "one weight for each of the 2 sources"),
        ("fusion={kind: fixed, weights: [1, -1]}", "fusion.weights: each should be 0, or between .* got -1"),
        ("fusion={kind: fixed, weights: [0, 0]}", "should not all be 0"),
        ("fusion.temperature=2", "only used with fusion.kind 'avg_ce'"),
        ("fusion={kind: avg_ce, weighting: reference, temperature: 2}", "weighting 'softmax'"),
        ("fusion={kind: fixed, weights: [1, .nan]}", r"fusion.weights.1: .*finite number \(got nan\)"),
        ("fusion={kind: fixed, weights: [1, .inf]}", r"fusion.weights.1: .*finite number"),
        ("fusion={kind: fixed, weights: [1.e-60, 0]}", "fusion.weights: each should be 0, or between .* got 1e-60"),
        ("fusion.window=4", "only used with fusion.level 'token'"),
        ("fusion={gate: target, ce_unit: token}", "should be 'byte' or 'aligned', not 'token'"),
        ("fusion.weighting=reference", "only used with fusion.kind 'avg_ce'"),
        ("fusion={kind: avg_ce, temperature: .inf}", "fusion.temperature: .*finite number"),
        ("fusion={kind: avg_ce, temperature: 1.e-45}", "fusion.temperature: .*greater than or equal to 0.001"),
        ("loss.z_loss=.inf", "loss.z_loss: .*finite number"),
        ("loss.temperature=1e-30", "loss.temperature: .*greater than or equal to 0.001"),
        ("loss.temperature=1e30", "loss.temperature: .*less than or equal to 1000"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: .*finite number"),
        ("seed=99999999999999999999", "seed: .*less than 4294967296"),
        ("loss.z_loss=-1", "greater than or equal to 0"),
        ("mesh.data=3", "does not divide over mesh.data x mesh.fsdp = 3; "),
        ("batch.microbatch=3", r"should divide batch.sequences = \d+ and be a multiple of"),
        ("optimizer.knd=lion", r"did you mean optimizer.kind\?"),
        ("sources.7.model=x", "index below 2"),
        ("loose", "form key=value"),
        ("max_length=[", "not valid YAML"),
        ("fusion={level: token, level: block}", "level is given twice"),
        ("sources.1.name=b", "two sources are called 'b'"),
        ("sources.1.name=fused", "cannot be called 'fused'"),
        ("corpus=3", r"corpus: should be \{key: value\} of path, split, .* \(got 3\)"),
        ("mesh=foo", r"mesh: should be auto, or \{key: value\} of data, fsdp, tensor \(got 'foo'\)"),
        ("sources.0=3", r"sources.0: should be a folder or a hub name, or \{key: value\} of model, name, "),
        ("sources=foo", r"sources: should be a list, \[a, b\] \(got 'foo'\)"),
        ("evaluation.corpus=3", r"evaluation.corpus: should be \{key: value\} of path"),
        ("output=s3:/bucket/run", "s3:/bucket/run: an address begins with s3://, as in s3://bucket/run"),
        ("target.bos=never", "should be the same"),
        ("sources.²=x", "'²' should be an index below 2"),
        ("sources=&a [*a]", "not valid YAML: "),
        ('output="a\\0b"', r"'a\\x00b': a path cannot hold the character 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line(path, override, message):
    with pytest.raises(UserError, match=message) as raised:
        config.load(path, [override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such configuration"),
        ("a: [", "line 1"),
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "bad.yaml: line 5: c is given twice, first in line 3"),
        ("a: &x {c: 1}\nb: {<<: *x, c: 2}\n", "bad.yaml: this is not a job's configuration; a job has"),
        ("a: 2024-13-45", "not valid YAML"),
        ("[" * 9999, "not valid YAML"),
        ("- 1", "key: value"),
        ("corpus: {path: x}", "target"),
        (
            "method: ties\nmodels: [a]",
            "bad.yaml: this is not a job's configuration; `fusejax merge .*bad.yaml` takes it",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        config.load(file)
    assert "bad.yaml" in str(raised.value)
