import json
import os
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


@pytest.mark.parametrize("below", ["", "/x"])
def test_a_name_that_is_too_long_is_a_user_error(tmp_path, below):
    folder = tmp_path / f"{'x' * 300}{below}"
    for use in (outputs.make_folder, outputs.require_writable, lambda path: outputs.locked(path).__enter__()):
        with pytest.raises(UserError, match=r"x: cannot be written \(File name too long\): choose another"):
            use(folder)
    with pytest.raises(UserError, match="too long"):  # its temporary name is
        outputs.require_writable(tmp_path / "folder" / ("x" * 250))
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        for use in (
            outputs.require_writable,
            lambda path: outputs.write_atomically(path, "x", outputs.ANOTHER_PATH),
        ):
            with pytest.raises(
                UserError, match=rf"{path}: cannot be written \(is no regular file\): choose another path"
            ):
                use(path)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    outputs.write_atomically(tmp_path / "file", "x")
    outputs.write_atomically(tmp_path / "file", "y")
    assert (tmp_path / "file").read_text() == "y"
    for path in ("/dev/stdout", "/dev/fd/1"):  # to a file, while pytest captures
        with pytest.raises(UserError, match="is no regular file"):
            outputs.require_writable(path)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux has /proc")
def test_a_folder_that_takes_no_file_is_found_before_the_work():
    """Also by root, who is told that it may write anywhere."""
    with pytest.raises(
        UserError, match=r"x.html: cannot be written \(No such file or directory\): choose another path"
    ):
        outputs.require_writable("/proc/x.html")
    for remedy, told in (
        (outputs.ANOTHER_PATH, "choose another path, or make"),
        ("", "choose another `output`, or make"),
    ):
        with pytest.raises(UserError, match=told):  # a job's own files are in its `output`
            outputs.write_atomically("/proc/x.html", "x", remedy)
