"""A line of rounds.jsonl: one type, one writer, one reader, one meaning of each number."""

import json
from pathlib import Path
from typing import get_type_hints

import pytest

from core.errors import UsageError
from journal.record import (
    FILE,
    METRICS,
    PER_ROUND,
    SCHEMA,
    ClientRecord,
    EvaluationRecord,
    FailureRecord,
    Present,
    RoundRecord,
    append_round,
    read_rounds,
    value_of,
)
from server.rounds import run_rounds
from strategies.registry import STRATEGIES
from tests.fake_clients import fake_grid, settings_of

PARTS = {
    "clients": ClientRecord,
    "client_held_out": EvaluationRecord,
    "failures": FailureRecord,
    "evaluation_failures": FailureRecord,
    "present": Present,
}


def test_what_was_written_is_read_under_a_schema(tmp_path: Path) -> None:
    path = tmp_path / FILE
    rounds: list[RoundRecord] = [{"round": 0, "held_out_loss": 2.0}, {"round": 1, "version": "a"}]
    lengths = [append_round(path, record) for record in rounds]
    assert lengths[-1] == path.stat().st_size
    assert [json.loads(line)["schema"] for line in path.read_text().splitlines()] == [SCHEMA] * 2
    assert read_rounds(path) == [{"schema": SCHEMA, **record} for record in rounds]


def test_a_line_that_is_being_written_is_left_out_and_an_older_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / FILE
    assert read_rounds(path) == []
    path.write_text('{"round": 0}\n{"round": 1, "seco')
    assert read_rounds(path) == [{"round": 0}]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"round": true}', "{}", ""])
def test_any_other_damage_is_told_with_its_line(line: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(f'{{"round": 0}}\n{line}\n')
    with pytest.raises(UsageError, match=r"rounds\.jsonl is damaged: line 2 is n"):
        read_rounds(tmp_path / FILE)


def test_not_a_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        append_round(tmp_path / FILE, {"round": 1, "train_loss": float("nan")})


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_key_that_a_run_writes_has_a_type(strategy: str, tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path / "run",
        strategy__name=strategy,
        lora__rank="2",
        rounds=2,
        evaluate__clients=True,
    )
    run_rounds(fake_grid(settings), settings)
    records = read_rounds(tmp_path / "run" / FILE)
    assert len(records) == 3
    for record in records:
        assert set(record) <= set(get_type_hints(RoundRecord))
        for key, part in PARTS.items():
            for each in value_of(record, key) or []:
                assert set(each) <= set(get_type_hints(part)), key


def test_the_table_of_metrics_names_numbers_of_records_first() -> None:
    hints = get_type_hints(RoundRecord)
    assert set(PER_ROUND) <= set(hints)
    assert all(metric.words and metric.unit for metric in METRICS.values())


def test_what_is_better_is_told_once() -> None:
    told = {key: metric.which_is_better for key, metric in METRICS.items()}
    assert told["held_out_loss"] == told["bytes_up"] == "lower is better"
    assert told["held_out_accuracy"] == told["worst_client_macro_f1"] == "higher is better"
    assert told["effective_rank"] == told["mean_change_norm"] == ""
