"""Files appear whole or not at all, and folders that hold something are left alone."""

import json
from pathlib import Path

import pytest

from tokensieve.config import UserError
from tokensieve.files import LOCK, check_free, is_free, locked, write_json, write_text
from tokensieve.model.positions import check_positions


def test_a_file_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path, monkeypatch) -> None:
    path = write_json(tmp_path / "new" / "metrics.json", {"loss": 1.5})
    assert path.read_text() == '{\n  "loss": 1.5\n}\n'
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"metrics.json cannot be written \(No space"):
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        write_text(path, "half")
    assert json.loads(path.read_text()) == {"loss": 1.5}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="check the path and its permissions"):
        write_text(tmp_path / "file" / "below", "x")


def test_free_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    assert is_free(tmp_path / "none") and is_free(tmp_path / "empty") and not is_free(tmp_path / "file")
    check_free(tmp_path / "empty")
    with pytest.raises(UserError, match="exists already; name a new folder, or remove it first"):
        check_free(tmp_path)


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    mine, made = tmp_path / "mine", tmp_path / "made"
    mine.mkdir()
    with locked(mine), locked(made):
        assert is_free(mine)  # the lock alone is nothing
        with pytest.raises(UserError, match="mine is in use by another run; wait for its end, or name another folder"):
            with locked(mine):
                pass
    assert mine.is_dir() and not made.exists() and not (mine / LOCK).exists()
    with locked(made):
        (made / "result").write_text("1")
    with locked(made):  # again
        assert not is_free(made)
    with pytest.raises(UserError, match="result cannot be written .*check the path"), locked(made / "result"):
        pass


def test_positions() -> None:
    check_positions(64, 64, "prompts of 64 tokens are", "shorten them")
    with pytest.raises(UserError, match="^prompts of 65 tokens are past the model's 64 positions; shorten them$"):
        check_positions(64, 65, "prompts of 65 tokens are", "shorten them")
