"""The checks of the soak see what they must: torn files, changed rounds, other bytes."""

from pathlib import Path
from typing import Any

import pytest

from tools.rehearsal.loopback import Loopback
from tools.rehearsal.quick_client import loss_of
from tools.soak_checks import (
    TornError,
    asked,
    check_goes_on,
    check_same,
    committed,
    failed,
    played,
    records,
    replayed,
)

SITES: dict[str, dict[str, Any]] = {"oslo": {"rank": 3}, "bergen": {"rank": 2}}
BOTH = ["bergen", "oslo"]
CONFIG = {"rounds": 3, "seed": 3, "evaluate": {"server": False}}


@pytest.fixture
def loopback(tmp_path: Path) -> Loopback:
    (tmp_path / "loopback").mkdir()
    return Loopback(tmp_path / "loopback")


def play(folder: Path, asks: list[list[str]], fails: list[Any], loopback: Loopback) -> Path:
    return played(
        folder, {"config": CONFIG, "sites": SITES, "asked": asks, "failed": fails}, loopback
    )


def test_a_replay_has_the_same_clients_and_bytes(tmp_path: Path, loopback: Loopback) -> None:
    late = [["oslo"], BOTH, BOTH]
    one = play(tmp_path / "one", late, [(3, "bergen")], loopback)
    assert (asked(one), failed(one)) == (late, [(3, "bergen")])
    check_same(one, replayed(tmp_path / "two", one, CONFIG, SITES, loopback))
    assert [
        {client["client"]: client["loss"] for client in record["clients"]}
        for record in records(one)[1:]
    ] == [
        {"oslo": loss_of("oslo", 1)},
        {name: loss_of(name, 2) for name in BOTH},
        {"oslo": loss_of("oslo", 3)},
    ]
    with pytest.raises(TornError, match="differ in"):
        check_same(one, play(tmp_path / "other", [BOTH] * 3, [(3, "bergen")], loopback))


def test_a_torn_or_changed_log_is_seen(tmp_path: Path, loopback: Loopback) -> None:
    run = play(tmp_path / "run", [BOTH] * 3, [], loopback)
    number, log = committed(run)
    assert (number, log) == (3, (run / "rounds.jsonl").read_bytes())
    with (run / "rounds.jsonl").open("ab") as file:
        file.write(b'{"round": 4, "cli')  # of a round that was not committed
    assert committed(run) == (number, log)
    check_goes_on((number, log), (4, log + b'{"round": 4}\n'))
    with pytest.raises(TornError, match="not the same any more"):
        check_goes_on((number, log), (3, log.replace(b"oslo", b"olso")))
    (run / "rounds.jsonl").write_bytes(log[:-20])
    with pytest.raises(TornError, match="bytes"):
        committed(run)
