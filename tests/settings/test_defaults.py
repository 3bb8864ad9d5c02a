"""The keys and pyproject.toml say the same; every key means something and something reads it."""

import re
import tomllib
from pathlib import Path

import pytest

import hatch_build
import settings.run
from settings.keys import flatten, flatten_tables, parse, walk
from settings.run import (
    EMBEDDED_ENDING,
    EMBEDDED_TEMPLATE,
    LEARNING_RATES,
    LoraSettings,
    RunSettings,
    default_values,
    run_settings,
)

ROOT = Path(settings.run.__file__).resolve().parent.parent
ROOMS = set(hatch_build.ROOMS) - {"core", "adapters"}
KEYS = {name: (kind, rule) for name, kind, rule in walk(RunSettings)}


def written_defaults() -> dict[str, object]:
    """The table as it stands in the file, read without the code under test."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    flat: dict[str, object] = {}
    for name, value in tables["tool"]["flwr"]["app"]["config"].items():
        below = (
            {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {}
        )
        flat |= below or {name: value}
    return flat


def test_every_key_has_a_default_and_every_default_a_key() -> None:
    assert set(written_defaults()) == set(KEYS)


def test_default_values_are_what_pyproject_says() -> None:
    assert default_values() == written_defaults()


def test_the_defaults_pass_their_own_checks() -> None:
    assert run_settings().rounds == written_defaults()["rounds"]


@pytest.mark.parametrize("name", KEYS)
def test_a_default_has_the_type_of_its_key(name: str) -> None:
    assert type(default_values()[name]) is KEYS[name][0]


@pytest.mark.parametrize("name", KEYS)
def test_a_key_says_what_it_means_in_a_sentence(name: str) -> None:
    doc = KEYS[name][1].doc
    assert re.fullmatch(r"\w.{10,}[.)]", doc)


def test_keys_are_kebab_case_with_at_most_one_dot() -> None:
    odd = [
        name for name in KEYS if not re.fullmatch(r"[a-z]+(-[a-z]+)*(\.[a-z]+(-[a-z]+)*)?", name)
    ]
    assert odd == []


def test_some_code_reads_every_key() -> None:
    source = "\n".join(path.read_text() for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    own_methods = (ROOT / "settings" / "run.py").read_text()
    unread = []
    for name in KEYS:
        section, _, leaf = name.rpartition(".")
        field = leaf.replace("-", "_")
        owner = (section or "settings").replace("-", "_")
        in_own_method = re.search(rf"\bself\.{field}\b", own_methods)
        if not in_own_method and not re.search(rf"\b{owner}\.{field}\b", source):
            unread.append(name)
    assert unread == []


def test_flatten_and_parse_undo_each_other() -> None:
    parsed = parse(RunSettings, default_values())
    assert flatten(parsed) == default_values()
    assert parse(RunSettings, flatten(parsed)) == parsed


def test_decided_settings_are_a_fixed_point() -> None:
    once = run_settings({"data.path": "mine.jsonl", "local.epochs": 7})
    assert run_settings(flatten(once)) == once


def test_a_section_parses_from_a_message_that_carries_more() -> None:
    message = {**default_values(), "round": 4, "lora.dropout": 0.25}
    assert parse(LoraSettings, message, "lora.").dropout == 0.25
    assert flatten(parse(LoraSettings, message, "lora."), "lora.") == {
        name: value for name, value in message.items() if name.startswith("lora.")
    }


def test_later_layers_win() -> None:
    settings = run_settings({"rounds": 5, "seed": 1}, {"rounds": 9})
    assert (settings.rounds, settings.seed) == (9, 1)


def test_embedded_data_decides_every_auto() -> None:
    data = run_settings().data
    assert (data.partition, data.template, data.ending) == (
        "natural",
        EMBEDDED_TEMPLATE,
        EMBEDDED_ENDING,
    )
    assert data.max_prompt == data.context // 2


def test_other_data_decides_every_auto() -> None:
    data = run_settings({"data.path": "mine.csv", "data.context": 100}).data
    assert (data.partition, data.template, data.ending) == ("iid", "{prompt}\n", "")
    assert data.max_prompt == 50


def test_the_learning_rate_is_decided_by_the_model() -> None:
    rates = [run_settings({"model.path": path}).local.learning_rate for path in ("embedded", "x/y")]
    assert rates == [LEARNING_RATES[True], LEARNING_RATES[False]]
    assert rates[0] > rates[1] > 0.0
    assert run_settings({"local.learning-rate": 0.5}).local.learning_rate == 0.5


def test_what_was_chosen_is_not_decided() -> None:
    chosen = {
        "data.path": "/mine.csv",
        "data.partition": "files",
        "data.template": "Q: {prompt}\nA:",
        "data.ending": "###",
        "data.max-prompt": 7,
    }
    data = run_settings(chosen).data
    assert flatten(data, "data.") | chosen == flatten(data, "data.")


@pytest.mark.parametrize(
    ("alpha", "rslora", "rank", "scale"),
    [("2r", False, 8, 2.0), ("16", False, 8, 2.0), ("16", True, 4, 8.0), ("0.5r", True, 16, 2.0)],
)
def test_scale_is_alpha_over_rank_or_its_root(
    alpha: str, rslora: bool, rank: int, scale: float
) -> None:
    lora = run_settings({"lora.alpha": alpha, "lora.rslora": rslora}).lora
    assert lora.scale_of(rank) == pytest.approx(scale, rel=1e-12)


def test_ranks_are_dealt_in_turn() -> None:
    settings = run_settings({"lora.rank": "8,4,2", "clients.count": 5})
    assert settings.ranks() == [8, 4, 2, 8, 4]
    assert run_settings({"lora.rank": "6", "clients.count": 3}).ranks() == [6, 6, 6]


def test_a_toml_list_of_ranks_is_read_as_one() -> None:
    tables = tomllib.loads('[lora]\nrank = [16, 8]\n[data]\npath = ["a.jsonl", "b.jsonl"]\n')
    settings = run_settings(flatten_tables(tables), {"clients.count": 2})
    assert settings.ranks() == [16, 8]
    assert settings.data.path == f"{Path.cwd()}/a.jsonl,{Path.cwd()}/b.jsonl"
