"""The file of a run, as Flower's own parser takes it and as `bouquet check` judges it."""

import re
import shlex
from pathlib import Path

import pytest
from flwr.common.config import fuse_dicts, parse_config_args
from typer.testing import CliRunner

from commands.cli import cli
from journal.run_folder import read_config
from server.method import method_of
from settings.keys import Value
from settings.run import default_values, run_settings
from strategies.registry import make_strategy

DOCS = Path(__file__).resolve().parents[2] / "docs"
LABELS = ("yes, but", "no")


def by_flower(*given: str) -> dict[str, Value]:
    """The configuration of a run under `flwr run . --run-config GIVEN`."""
    return fuse_dicts(default_values(), parse_config_args(list(given)))


def checked(folder: Path) -> tuple[int, str]:
    (folder / "site.toml").write_text(
        "superlink = 'localhost:9092'\nport = 9094\n[node]\nname = 'oslo'\n"
        f"data-path = 'd'\nmodel-path = '{folder}/none'\ndevice = 'cpu'\n"
    )
    command = ["check", str(folder), "--offline", "--config", str(folder / "run.toml")]
    said = CliRunner(env={"COLUMNS": "400"}).invoke(cli, command)
    return said.exit_code, " ".join(str(said.exception or said.output).split())


@pytest.mark.parametrize("page", ["compare.md", "deploy.md"])
def test_the_documented_labels_with_commas_reach_a_run(page: str, tmp_path: Path) -> None:
    found = re.search(r"data\.labels = '.*'", (DOCS / page).read_text())
    assert found is not None
    (tmp_path / "run.toml").write_text(found[0])
    settings = run_settings(by_flower(str(tmp_path / "run.toml")))
    assert settings.data.listed_labels() == LABELS


def test_so_does_the_documented_option() -> None:
    found = re.search(r"`--run-config (.*)`", (DOCS / "compare.md").read_text())
    assert found is not None
    settings = run_settings(by_flower(*shlex.split(found[1])))
    assert settings.data.listed_labels() == LABELS


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ('labels = ["yes, but", "no"]', """labels = '["yes, but", "no"]'"""),
        ('labels = ["it\'s, so", "no"]', """labels = '''["it's, so", "no"]'''"""),
        ('path = ["/a.jsonl", "/b.jsonl"]', "path = '/a.jsonl,/b.jsonl'"),
    ],
)
def test_a_list_is_refused_as_flower_will_and_the_advice_works(
    line: str, advice: str, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(f"[data]\n{line}\n")
    with pytest.raises(ValueError, match="needs to be of type"):
        by_flower(str(tmp_path / "run.toml"))
    code, said = checked(tmp_path)
    key = f"data.{line.split()[0]}"
    told = f"run.toml: {key} is a list, which flwr run does not take: write it as text, {advice}"
    assert code != 0
    assert said.endswith(told)
    (tmp_path / "run.toml").write_text(f"[data]\n{advice}\n")
    (tmp_path / "plain.toml").write_text(f"[data]\n{line}\n")
    taken = run_settings(by_flower(str(tmp_path / "run.toml")))
    assert taken == run_settings(read_config(tmp_path / "plain.toml"))
    assert "is a list" not in checked(tmp_path)[1]


def test_a_knob_reaches_a_run_as_text_and_a_key_of_its_own_is_refused_with_the_text(
    tmp_path: Path,
) -> None:
    (tmp_path / "run.toml").write_text('strategy.name = "flora"\nstrategy.flora.energy = 0.5\n')
    with pytest.raises(ValueError, match=r"strategy\.flora\.energy"):
        by_flower(str(tmp_path / "run.toml"))
    code, said = checked(tmp_path)
    assert code != 0
    found = re.search(r'strategy\.knobs = "?(flora\.energy=0\.5)"?', said)
    assert found is not None, said
    (tmp_path / "run.toml").write_text(f'strategy.name = "flora"\nstrategy.knobs = "{found[1]}"\n')
    settings = run_settings(by_flower(str(tmp_path / "run.toml")))
    assert method_of(settings) == make_strategy("flora", energy=0.5)
