import json

import numpy as np
import pytest

from fusejax import outputs, store
from fusejax.errors import UserError


def records(n):
    rng = np.random.default_rng(0)
    return [
        {"id": f"d{i}", "text": "é\n😀" * i, "ids": rng.integers(0, 9, (i, 3)).astype(np.uint16),
         "ce": rng.random(i).astype(np.float32)}
        for i in range(n)
    ]  # fmt: skip


def write(folder, n=7, inputs=None, shards=None):
    writer = store.StoreWriter(folder, inputs or {"corpus": "a"}, n, shard_records=3)
    all_records = records(n)
    for shard, span in writer.missing():
        if shards is None or shard in shards:
            writer.write(shard, [all_records[i] for i in span])
    return writer


def test_round_trip(tmp_path):
    write(tmp_path / "s").finish({"rows": 21})
    read = store.Store(tmp_path / "s")
    assert len(read) == 7
    assert read.summary == {"rows": 21}
    for i in (6, 0, 3):
        for name, value in records(7)[i].items():
            np.testing.assert_array_equal(read[i][name], value)
            assert getattr(read[i][name], "dtype", None) == getattr(value, "dtype", None)


def test_goes_on_at_the_missing_shard(tmp_path):
    write(tmp_path / "s", shards={0, 2})
    writer = store.StoreWriter(tmp_path / "s", {"corpus": "a"}, 7, shard_records=3)
    assert writer.missing() == [(1, range(3, 6))]
    with pytest.raises(ValueError, match="1 shards"):
        writer.finish({})
    with pytest.raises(UserError, match="not finished"):
        store.Store(tmp_path / "s")
    write(tmp_path / "s").finish({})
    assert [r["id"] for r in store.Store(tmp_path / "s")] == [f"d{i}" for i in range(7)]


def test_other_inputs_are_named(tmp_path):
    write(tmp_path / "s", inputs={"corpus": "a", "model": "m"}).finish({})
    with pytest.raises(UserError, match=r"other settings: model \(m there, n now\)"):
        store.StoreWriter(tmp_path / "s", {"corpus": "a", "model": "n"}, 7)


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("runs/sources/data/train/documents", "fusejax prepare CONFIG.yaml"),
        ("job/data/heldout/tokens/0123", "fusejax prepare CONFIG.yaml"),
        ("job/sources/fine", "fusejax sources CONFIG.yaml"),
        ("job/alignment/fine/chain", "fusejax align CONFIG.yaml"),
    ],
)
def test_what_is_missing_names_the_command_that_makes_it(tmp_path, folder, command):
    with pytest.raises(UserError, match=f"no store here; .*`{command}`"):
        store.Store(tmp_path / folder)
    write(tmp_path / folder, shards={0})
    with pytest.raises(UserError, match=f"not finished; .*`{command}`"):
        store.Store(tmp_path / folder)


@pytest.mark.parametrize("position", [0.3, 0.5, 0.7])
def test_a_flipped_byte_is_found(tmp_path, position):
    write(tmp_path / "s").finish({})
    path = tmp_path / "s" / "000001.array_record"
    data = bytearray(path.read_bytes())
    used = data.rindex(b"d5") + 60  # the format pads shards to 64 KiB
    data[int(position * used)] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"000001\.array_record"):
        read = store.Store(tmp_path / "s")
        found = [read[i] for i in range(3, 6)]
        for record, expected in zip(found, records(7)[3:6], strict=True):
            assert record["id"] == expected["id"]
        pytest.fail("nobody noticed")


def test_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        store.StoreWriter(tmp_path / "file" / "s", {}, 1)


def test_full_disk_is_a_user_error_and_keeps_finished_shards(tmp_path, monkeypatch):
    writer = write(tmp_path / "s", shards={0})
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda _: type("U", (), {"free": 10})())
    with pytest.raises(UserError, match="free some space"):
        writer.write(1, records(3))
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["000000.array_record", "manifest.json"]


def test_a_library_that_finds_the_disk_full_is_a_user_error(tmp_path, monkeypatch):
    from array_record.python import array_record_module

    class Full:
        def __init__(self, path, options):
            self.path = path

        def write(self, blob):
            raise RuntimeError(f"write() failed: No space left on device; {self.path}")

    writer = write(tmp_path / "s", shards=set())
    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        writer.write(0, records(3))
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("changes", [{"complete": None}, {"inputs": []}, {"n_records": "7"}, {"shard_records": 0}])
def test_a_manifest_that_is_none(tmp_path, changes):
    write(tmp_path / "s").finish({})
    path = tmp_path / "s/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=r"is not a store of format 2; remove .* to make it anew"):
        store.Store(tmp_path / "s")
