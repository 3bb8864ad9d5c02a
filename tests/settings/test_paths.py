"""Names in the configuration: plain characters, and absolute from the door on."""

from pathlib import Path

import pytest

from settings.keys import as_list, flatten, listed
from settings.paths import absolute_paths, named_paths
from settings.run import run_settings

NAMES = [
    "~a.jsonl",
    "site[1].jsonl",
    "a, b.jsonl",
    "what?.csv",
    "* all.JSON",
    '["c"].jsonl',
    "d'e\"f.jsonl",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_file_that_is_there_is_one_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    assert named_paths(name) == (name,)
    text = absolute_paths(name)
    assert named_paths(text) == (f"{tmp_path}/{name}",)
    (tmp_path / name).unlink()
    assert listed(text) == (f"{tmp_path}/{name}",)  # also where the file has gone since


def test_several_names_stand_in_a_list(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).write_text("")
    text = absolute_paths(as_list(NAMES), tmp_path)
    assert named_paths(text) == tuple(f"{tmp_path}/{name}" for name in NAMES)
    assert absolute_paths(text) == text


def test_a_name_longer_than_any_file_may_have_is_a_list() -> None:
    many = ",".join(f"/folder/{k}.jsonl" for k in range(2000))
    assert len(named_paths(many)) == 2000


def test_paths_of_a_run_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = run_settings(
        {
            "data.path": "a.jsonl, b.jsonl",
            "data.evaluation": "~/test.jsonl",
            "data.chat-template-file": "chat.jinja",
            "start.adapter": "../adapter",
            "model.path": "model",
        }
    )
    assert settings.data.path == f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"
    assert settings.data.evaluation == str(Path.home() / "test.jsonl")
    assert settings.data.chat_template_file == f"{tmp_path}/chat.jinja"
    assert Path(settings.start.adapter).is_absolute()
    assert settings.model.path == f"{tmp_path}/model"
    monkeypatch.chdir("/")
    assert run_settings(flatten(settings)) == settings


@pytest.mark.parametrize("path", ["embedded", "Qwen/Qwen2.5-0.5B"])
def test_what_is_no_path_stays(path: str) -> None:
    assert run_settings({"model.path": path}).model.path == path
    plain = run_settings().data
    assert (plain.path, plain.evaluation, plain.chat_template_file) == ("embedded", "", "")


def test_a_folder_that_is_not_there_is_a_folder_all_the_same(tmp_path: Path) -> None:
    assert run_settings({"model.path": "./nowhere"}).model.path == f"{Path.cwd()}/nowhere"
