import json
import shutil

import pytest

from fusejax import outputs
from fusejax.errors import UserError


def test_fingerprint_ignores_key_order():
    assert outputs.fingerprint({"a": 1, "b": 2}) == outputs.fingerprint(json.loads('{"b": 2, "a": 1}'))
    assert outputs.fingerprint("a") != outputs.fingerprint("b")


def test_a_key_younger_than_the_folder_had_its_default_if_its_section_was_there(tmp_path):
    made_from, defaults = {"batch.size": 2}, {"batch.size": 1, "batch.new": 5, "lora.rank": 8}
    outputs.check_inputs(tmp_path, made_from, made_from | {"batch.new": 5}, defaults=defaults)
    for wanted, message in (
        ({"batch.new": 6}, r"batch.new \(5 there, 6 now\)"),
        ({"lora.rank": 8}, r"lora.rank \(None there, 8 now\)"),
    ):
        with pytest.raises(UserError, match=message):
            outputs.check_inputs(tmp_path, made_from, made_from | wanted, defaults=defaults)


def test_one_job_at_a_time(tmp_path):
    with outputs.locked(tmp_path / "out"), pytest.raises(UserError, match="another job"):  # noqa: SIM117
        with outputs.locked(tmp_path / "out"):
            pytest.fail("both hold it")
    assert not (tmp_path / "out").exists()  # nothing came of it
    with pytest.raises(UserError, match="why"), outputs.locked(tmp_path / "out"):
        shutil.rmtree(tmp_path / "out")
        raise UserError("why")
    (tmp_path / "mine").mkdir()
    with outputs.locked(tmp_path / "out"), outputs.locked(tmp_path / "mine"):
        (tmp_path / "out/file").write_text("x")
    assert (tmp_path / "out/file").exists()
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize("below", ["", "/x"])
def test_a_file_in_the_way_is_a_user_error(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        outputs.write_atomically(f"{tmp_path}/file{below}/report.json", "{}")
    assert (tmp_path / "file").read_text() == "x"
