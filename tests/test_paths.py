"""Stores, models and metrics in a bucket: fsspec's own file system in memory stands behind s3:// for epath."""

import gzip
import os
import resource

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import fusejax
from fusejax import alignment, config, export, inspection, metrics, models, paths, reading, sources, store, verification
from fusejax.batches import Batches
from fusejax.errors import UserError
from fusejax.store import Store, StoreWriter


class Bucket(MemoryFileSystem):
    protocol = ("s3",)
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(os.fspath(path).removeprefix("s3://"))


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setenv("EPATH_USE_TF", "false")
    fsspec.register_implementation("s3", Bucket, clobber=True)
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    return "s3://bucket"


def records(n):
    return [{"text": "é" * i, "ids": np.arange(i, dtype=np.uint16)} for i in range(n)]


def write(folder, n=7, shards=None):
    writer = StoreWriter(folder, {"corpus": "a"}, n, shard_records=3)
    for shard, span in writer.missing():
        if shards is None or shard in shards:
            writer.write(shard, [records(n)[i] for i in span], {"rows": shard})
    return writer


def test_a_store_goes_on_and_is_read_at_random(bucket):
    write(f"{bucket}/s", shards={0, 2})
    writer = write(f"{bucket}/s")
    assert writer.notes({"rows": int}) == [{"rows": shard} for shard in range(3)]
    with pytest.raises(UserError, match="s3://bucket/s: is not finished"):
        Store(f"{bucket}/s")
    writer.finish({"rows": 21})
    read = Store(f"{bucket}/s")
    for i in (6, 0, 3, 1, 5):
        for name, value in records(7)[i].items():
            np.testing.assert_array_equal(read[i][name], value)
    shards = {f"00000{i}{end}" for i in range(3) for end in (".json", ".array_record")}
    assert paths.names(read.folder) == {"manifest.json"} | shards
    with pytest.raises(UserError, match="s3://bucket/s: was made with other settings: corpus"):
        StoreWriter(f"{bucket}/s", {"corpus": "b"}, 7, 3)


def test_a_flipped_byte_and_a_missing_shard_are_named(bucket, capsys):
    write(f"{bucket}/s").finish({})
    inspection.show(f"{bucket}/s", 4)
    verification.verify(f"{bucket}/s")
    assert "7 records, every checksum right" in capsys.readouterr().out
    shard = paths.at(f"{bucket}/s/000001.array_record")
    data = bytearray(shard.read_bytes())
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    data[used[len(used) // 2]] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"s3://bucket/s/000001.array_record: record \d is damaged"):
        list(Store(f"{bucket}/s"))
    shard.unlink()
    with pytest.raises(UserError, match=r"s3://bucket/s/000001.array_record: is missing"):
        Store(f"{bucket}/s")[3]


def test_what_does_not_arrive_is_not_there(bucket, monkeypatch):
    writer = write(f"{bucket}/s", shards={0})
    real = fsspec.implementations.memory.MemoryFile.write

    def refuse(self, data):
        real(self, data[: len(data) // 2])
        raise RuntimeError("Quota exceeded")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "write", refuse)
    with pytest.raises(UserError, match=r"s3://bucket/s/000001.array_record: cannot be written \(Quota exceeded\)"):
        writer.write(1, records(3))
    assert [shard for shard, _ in writer.missing()] == [1, 2]


def test_stages_leave_there_what_they_leave_here(bucket, make_job, tiny_models):
    here = make_job("here", sources=[{"model": tiny_models["fine"], "name": "fine"}])
    there = here.model_copy(update={"output": f"{bucket}/job"})
    for folder, _, names in os.walk(here.folder):
        for name in names:
            file = os.path.join(folder, name)
            paths.send(paths.at(file), there.folder / os.path.relpath(file, here.folder))
    for job in (here, there):
        sources.run(job)
        alignment.run(job)
    for name in ("sources/fine", "alignment/fine", "alignment/fine/chain"):
        a, b = Store(here.folder / name), Store(there.folder / name)
        assert (a.inputs, a.summary) == (b.inputs, b.summary)
        for left, right in zip(a, b, strict=True):
            for key in left:
                np.testing.assert_array_equal(left[key], right[key])
    for key, array in Batches(here).batch(1).items():
        np.testing.assert_array_equal(Batches(there).batch(1)[key], array)
    assert alignment.read_report(here.folder, "fine") == alignment.read_report(there.folder, "fine")


def test_a_model_takes_the_place_of_another(bucket, tiny_models):
    folder = paths.at(f"{bucket}/export")
    for name in ("coarse", "fine"):
        hf_config, _ = models.read_config(tiny_models[name])
        export.save(fusejax.load(tiny_models[name]), hf_config, folder, tokenizer_from=tiny_models[name])
        (folder / "mine.txt").write_text("stays")
    with paths.local_folder(folder, "export") as copy:
        ids = np.array([[5, 6, 7]])
        np.testing.assert_array_equal(fusejax.load(copy)(ids), fusejax.load(tiny_models["fine"])(ids))
    assert {"config.json", "model.safetensors", "tokenizer.json", "mine.txt"} <= paths.names(folder)


def test_metrics_outlive_a_kill_up_to_what_was_kept(bucket):
    log = metrics.Metrics(f"{bucket}/run", 0)
    for step in (1, 2):
        log.write(step, {"loss": 1.0 / step})
    log.keep()
    log.write(3, {"loss": 0.3})  # and then the process dies
    assert [row["step"] for row in metrics.read(f"{bucket}/run")] == [1, 2]
    log = metrics.Metrics(f"{bucket}/run", 1)
    log.write(2, {"loss": 0.25})
    log.close()
    assert [row["loss"] for row in metrics.read(f"{bucket}/run")] == [1.0, 0.25]
    assert paths.names(paths.at(f"{bucket}/run/tensorboard"))


def test_a_corpus_in_a_bucket(bucket, tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "one.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    (tmp_path / "a" / "deep" / "two.jsonl.gz").write_bytes(gzip.compress(b'{"text": "z"}\n'))
    (tmp_path / "a" / ".hidden.txt").write_text("no")
    for file in ("one.jsonl", "deep/two.jsonl.gz", ".hidden.txt"):
        paths.send(tmp_path / "a" / file, paths.at(f"{bucket}/corpus/{file}"))
    here, there = (
        [(text.domain, text.text) for text in reading.texts(config.CorpusConfig(path=path))]
        for path in (str(tmp_path / "a"), f"{bucket}/corpus")
    )
    assert here == there == [("two", "z"), ("one", "x"), ("one", "y")]


JOB = {"target": "a/b", "sources": ["a/b", "c/d", "e/f"], "corpus": {"path": "x"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "memory://x"}, "memory://x: should be a folder, or an address that begins with gs://"),
        ({"target": "gs://b/model"}, "target.model: gs://b/model is in a bucket; models are read from folders"),
        ({"output": "gs://b/x", "profile": {}}, "profile: needs an `output` on this machine, not gs://b/x"),
        ({"output": "gs://b/x", "fusion": {"kind": "pairwise", "merge": "sce"}}, "'pairwise': needs an `output` on"),
        ({"output": "gs://b/x", "evaluation": {"baselines": ["ensemble", "merge"]}}, "all but 'ensemble': needs an"),
    ],
)
def test_what_a_bucket_cannot_hold_is_refused(changes, message):
    with pytest.raises(UserError) as error:
        config.validate(JOB | changes)
    assert message in str(error.value)


def test_a_bucket_out_of_reach_is_one_line():
    fsspec.register_implementation("az", "no_such_package.AzureFileSystem", clobber=True, errtxt="install adlfs")
    with pytest.raises(UserError, match=r"az://b: cannot be reached from here \(install adlfs\)"):
        store.read_manifest("az://b/job/sources/x")
    with pytest.raises(UserError, match="s3://b/job/checkpoints: checkpoints go to folders and to gs://"):
        paths.require_checkpoints(paths.at("s3://b/job/checkpoints"))


def test_more_shards_than_files_may_be_open(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    writer = StoreWriter(tmp_path / "s", {}, 700, shard_records=1)
    for shard, span in writer.missing():
        writer.write(shard, [{"n": np.array([i])} for i in span])
    writer.finish({})
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
    try:
        assert [int(record["n"][0]) for record in Store(tmp_path / "s")] == list(range(700))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_local_paths_stay_pathlibs(tmp_path):
    assert type(paths.at(str(tmp_path))) is type(tmp_path)
    (tmp_path / "f").write_text("x")
    assert (paths.size(tmp_path / "f"), paths.names(tmp_path), paths.names(tmp_path / "none")) == (1, {"f"}, set())
    assert str(paths.at("gs://b/a") / "c") == "gs://b/a/c"
