"""bouquet status: read from a run's folder, also while a line is being written."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from commands.cli import cli, main
from core.errors import UsageError
from journal.run_folder import RunFolder, open_run_folder
from journal.status import read_status
from server import progress
from server.admission import Rejection
from server.roster import Roster
from server.status_file import StatusFile
from server.waiting import COMING_BACK, Waiting
from settings.keys import Value
from settings.run import run_settings
from tests.fake_clients import member_named


def client(name: str, seconds: float = 2.0) -> dict[str, Any]:
    return {
        "client": name,
        "rank": 4,
        "num_examples": 30,
        "train_seconds": seconds,
        "bytes_up": 1000,
        "bytes_down": 500,
    }


def round_line(number: int, took_part: list[str], failed: dict[str, str]) -> dict[str, Any]:
    return {
        "round": number,
        "train_loss": 2.5,
        "bytes_up": 1000 * len(took_part),
        "bytes_down": 500 * len(took_part),
        "seconds": 12.0,
        "clients": [client(name) for name in took_part],
        "failures": [{"client": name, "reason": reason} for name, reason in failed.items()],
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    values: dict[str, Value] = {"rounds": 3, "output": str(tmp_path / "run")}
    folder = RunFolder(tmp_path / "run")
    folder.create(run_settings(values))
    folder.append({"round": 0})
    folder.append(round_line(1, ["bergen", "oslo"], {"tromso": "no reply within 60 s"}))
    folder.append(round_line(2, ["bergen", "oslo", "tromso"], {}))
    return folder


def test_who_took_part_and_who_failed(run: RunFolder) -> None:
    found = read_status(run.path)
    assert (found.done, found.wanted, found.finished) == (2, 3, False)
    bergen, oslo, tromso = found.sites()
    assert (bergen.site, oslo.site, tromso.site) == ("bergen", "oslo", "tromso")
    assert (oslo.rounds, oslo.failures, oslo.train_seconds) == ([1, 2], [], 4.0)
    assert (oslo.bytes_up, oslo.bytes_down) == (2000, 1000)
    assert (tromso.rounds, tromso.failures) == ([2], [(1, "no reply within 60 s")])
    assert (found.state, found.exit_code) == ("stopped", 1)
    assert "round 2 of 3 was the last that it saved" in found.sentence()
    with run.locked():
        found = read_status(run.path)
    assert (found.state, found.exit_code) == ("running", 2)
    assert found.sentence() == "goes on with round 3 of 3"


def test_a_line_that_is_being_written_is_left_out(run: RunFolder) -> None:
    with (run.path / "rounds.jsonl").open("a") as log:
        log.write('{"round": 3, "train')
    assert read_status(run.path).done == 2


def test_a_run_is_finished_when_its_adapter_is_there(run: RunFolder) -> None:
    run.append(round_line(3, ["oslo"], {}))
    assert not read_status(run.path).finished
    (run.path / "adapter").mkdir()
    found = read_status(run.path)
    assert (found.finished, found.exit_code) == (True, 0)
    assert found.sentence() == "finished: round 3 of 3 is done"
    assert found.next_step().startswith("the adapter is in")


def test_a_method_with_personal_models_names_no_adapter_and_one_kind_of_loss(
    tmp_path: Path,
) -> None:
    values: dict[str, Value] = {"rounds": 1, "strategy.name": "fedsa-lora"}
    folder = RunFolder(tmp_path / "run")
    folder.create(run_settings(values, {"output": str(folder.path)}))
    folder.append({"round": 0, "held_out_loss": 9.25, "client_held_out_loss": 8.5})
    assert read_status(folder.path).own_losses
    folder.append({**round_line(1, ["oslo"], {}), "client_held_out_loss": 7.5})
    words = read_status(folder.path).next_step()
    assert "fedsa-lora has a model for each client, and no global adapter" in words
    assert "/adapter" not in words
    said = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["status", str(folder.path)]).output
    assert "finished: round 1 of 1 is done" in said
    assert all(words in said for words in ("clients' loss", "8.5000", "7.5000"))
    assert not any(words in said for words in ("held-out loss", "9.2500"))


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").create(run_settings({"output": str(tmp_path / "run")}))
    found = read_status(tmp_path / "run")
    assert (found.done, found.records, found.sites()) == (0, [], [])
    assert "round 0 of 3 was the last" in found.sentence()


def test_the_command(run: RunFolder) -> None:
    said = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["status", str(run.path)])
    assert said.exit_code == 1, said.output
    assert "stopped: no process runs it, and round 2 of 3" in said.output
    assert "round 1: tromso failed: no reply within 60 s" in said.output


MEMBERS = [
    member_named(name, 10 + number, 4, number=number, num_examples=30)
    for number, name in enumerate(["bergen", "oslo", "tromso"])
]


@pytest.fixture
def file(run: RunFolder) -> StatusFile:
    return StatusFile(RunObserver(), run.path, rounds=3, needed=2)


class RunObserver(progress.RunObserver):
    """Cares for nothing."""


def opened(file: StatusFile, run: RunFolder) -> None:
    left_out = {"narvik": "has base model other, the run's is base"}
    file.run_opened(run.path, Roster(MEMBERS, "base", {"q": (8, 8)}, left_out), 2, 3)


def test_who_is_waited_for_before_anybody_is_known(run: RunFolder, file: StatusFile) -> None:
    file.waiting(Waiting("answers of sites", ("bergen",), ("node 12",), 1, 40.0, 560.0))
    with run.locked():
        found = read_status(run.path)
    assert (found.state, found.exit_code) == ("waiting", 2)
    words = r"alive: asking who is there; waiting for node 12 and 1 site more, since 4\d s"
    assert re.fullmatch(words, found.sentence())
    assert found.live is not None
    assert found.live.deadline is not None
    assert read_status(run.path).state == "stopped"  # nobody holds its lock any more


def test_who_is_late_in_a_round_and_since_when(run: RunFolder, file: StatusFile) -> None:
    opened(file, run)
    file.round_started(3, MEMBERS)
    file.waiting(Waiting("training", ("bergen", "oslo"), ("tromso",), 0, 90.0, 500.0, ("tromso",)))
    with run.locked():
        found = read_status(run.path)
    words = r"alive: round 3 of 3, training; waiting for tromso, since 9\d s; asked again: tromso"
    assert re.fullmatch(words, found.sentence())
    assert found.live is not None
    states = {site.name: site.state for site in found.live.sites}
    assert states == {
        "bergen": "answered",
        "narvik": "left out",
        "oslo": "answered",
        "tromso": "late",
    }
    assert found.live.site("tromso").late_since is not None
    assert found.live.site("narvik").words == "has base model other, the run's is base"


def test_who_was_left_out_is_so_no_more_once_the_wait_says_so(file: StatusFile) -> None:
    why = {"bergen": "as many sites have another", "oslo": "as many sites have another"}
    file.waiting(Waiting("answers of sites", (), ("tromso",), 0, 4.0, 50.0, (), why))
    assert file.status.site("bergen").state == "left out"
    file.waiting(Waiting("answers of sites", ("bergen",), ("tromso",), 0, 5.0, 49.0))
    bergen, oslo = file.status.site("bergen"), file.status.site("oslo")
    assert (bergen.state, bergen.words) == ("answered", None)
    assert (oslo.state, oslo.words) == ("absent", None)


def test_who_is_gone_before_a_round_is_absent_and_here_when_it_is_back(
    run: RunFolder, file: StatusFile
) -> None:
    opened(file, run)
    file.present(("bergen",), ("oslo",))
    assert (file.status.site("bergen").state, file.status.site("oslo").state) == ("here", "absent")
    file.present(("bergen", "oslo"), ())
    assert file.status.site("oslo").state == "here"


def test_why_a_site_is_left_out(run: RunFolder, file: StatusFile) -> None:
    opened(file, run)
    said = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["status", str(run.path)])
    assert "narvik is left out: has base model other, the run's is base" in said.output


def test_what_a_round_brought(run: RunFolder, file: StatusFile) -> None:
    opened(file, run)
    record = round_line(3, ["bergen", "oslo"], {}) | {
        "held_out_loss": 2.0,
        "held_out_accuracy": 0.5,
    }
    for each in record["clients"]:
        each |= {"loss": 2.5, "change_norm": 0.25}
    file.round_finished(record, [Rejection("tromso", "out of memory\x1b[2J")])
    found = read_status(run.path)
    assert found.live is not None
    assert (found.live.loss, found.live.metrics) == (2.0, {"accuracy": 0.5})
    assert (found.live.round_seconds, found.live.rounds_done) == (12.0, 3)
    bergen, tromso = found.live.site("bergen"), found.live.site("tromso")
    assert (bergen.bytes_up, bergen.seconds, bergen.change) == (3000, 2.0, 0.25)
    assert (tromso.failures, tromso.failed_round) == (2, 3)
    assert tromso.words == "out of memory\\x1b[2J"


def test_a_failure_in_its_words(run: RunFolder, file: StatusFile) -> None:
    file.run_failed("0 clients connected within 30 s; 2 needed")
    found = read_status(run.path)
    assert (found.state, found.exit_code) == ("failed", 1)
    assert found.sentence().endswith("0 clients connected within 30 s; 2 needed")


def test_the_document_for_programs(run: RunFolder, file: StatusFile) -> None:
    opened(file, run)
    with run.locked():
        said = CliRunner().invoke(cli, ["status", str(run.path), "--json"])
    assert said.exit_code == 2
    told = json.loads(said.output)
    assert (told["state"], told["format"], told["rounds"]) == ("running", "bouquet-status-1", 3)
    assert [site["name"] for site in told["sites"]] == ["bergen", "narvik", "oslo", "tromso"]
    page = (Path(__file__).parents[2] / "docs" / "status.md").read_text()
    for name in [*told, *told["sites"][0]]:
        assert f"`{name}`" in page, name  # every field is explained


def test_a_take_up_counts_committed_rounds_alone_and_hears_nobody_yet(
    run: RunFolder, file: StatusFile
) -> None:
    opened(file, run)
    # A third round, whose state was never saved: the take-up plays it again.
    record = round_line(3, ["bergen"], {})
    record["clients"][0] |= {"loss": 2.5, "change_norm": 0.25}
    file.round_finished(record, [Rejection("oslo", "out of memory")])
    status = StatusFile(RunObserver(), run.path, rounds=3, needed=2).status
    bergen, oslo, tromso = status.sites
    assert (bergen.bytes_up, bergen.state, oslo.failures, tromso.failures) == (2000, "absent", 0, 1)
    assert (status.rounds_done, status.state, status.expected_end) == (2, "waiting", None)
    assert bergen.last_seen is not None
    assert bergen.answered_at is None


def test_a_finished_run_that_is_taken_up_with_more_rounds_is_not_finished(
    run: RunFolder, file: StatusFile
) -> None:
    run.append(round_line(3, ["oslo"], {}))
    (run.path / "adapter").mkdir()
    file.run_finished(run.path)
    assert read_status(run.path).state == "finished"
    file = StatusFile(RunObserver(), run.path, rounds=5, needed=2)
    with run.locked():
        found = read_status(run.path)
        assert (found.state, found.exit_code, found.wanted) == ("waiting", 2, 5)
    assert read_status(run.path).state == "stopped"
    file.run_failed("0 clients connected within 30 s; 2 needed")
    assert read_status(run.path).state == "failed"


def test_the_last_round_of_a_take_up_is_not_its_end(run: RunFolder, file: StatusFile) -> None:
    run.append(round_line(3, ["oslo"], {}))
    (run.path / "adapter").mkdir()
    file.run_finished(run.path)
    file = StatusFile(RunObserver(), run.path, rounds=4, needed=2)
    opened(file, run)
    run.append(round_line(4, ["oslo"], {}))
    with run.locked():  # it evaluates, and writes the adapter anew
        file.phase_started("writing the adapter")
        assert (read_status(run.path).state, read_status(run.path).exit_code) == ("running", 2)
    assert read_status(run.path).state == "stopped"
    file.run_finished(run.path)
    assert read_status(run.path).state == "finished"


@pytest.mark.parametrize("ends", [True, False])
def test_a_run_that_ends_or_begins_while_it_is_read(
    run: RunFolder, file: StatusFile, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    opened(file, run)
    looks = []

    def is_locked(folder: RunFolder) -> bool:
        if ends and len(looks) == 1:  # between the first look and the second
            file.run_failed("no disk")
        looks.append(folder)
        return (len(looks) == 1) == ends

    monkeypatch.setattr(RunFolder, "is_locked", is_locked)
    assert read_status(run.path).state == ("failed" if ends else "running")


def test_a_run_is_locked_before_anybody_can_take_it_for_one(tmp_path: Path) -> None:
    settings = run_settings({"output": str(tmp_path / "run")})
    write, seen = RunFolder.write, []

    def look(folder: RunFolder, name: str, data: bytes) -> None:
        seen.append((name, folder.is_locked()))
        write(folder, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write", look)
        with open_run_folder(settings, {"files": []}):
            assert read_status(tmp_path / "run").state == "running"
    assert seen == [("data.json", True), ("config.toml", True)]


def test_a_run_without_its_adapter_and_without_a_process_has_stopped(
    run: RunFolder, file: StatusFile
) -> None:
    run.append(round_line(3, ["oslo"], {}))
    file.run_finished(run.path)
    assert (read_status(run.path).state, read_status(run.path).exit_code) == ("stopped", 1)


def test_a_round_whose_answers_came_all_at_once_has_answers(
    run: RunFolder, file: StatusFile
) -> None:
    opened(file, run)
    file.round_started(3, MEMBERS)
    file.waiting(Waiting("training", ("bergen", "oslo", "tromso"), (), 0, 90.0, 0.0))
    file.phase_started("aggregating")
    assert {site.state for site in file.status.sites} == {"answered", "left out"}


def test_nodes_that_have_said_their_names_leave_no_row(run: RunFolder, file: StatusFile) -> None:
    file.waiting(Waiting("answers of sites", ("bergen",), ("node 12",), 0, 1.0, 9.0))
    assert [site.name for site in file.status.sites] == ["bergen", "node 12", "oslo", "tromso"]
    opened(file, run)
    assert [site.name for site in file.status.sites] == ["bergen", "narvik", "oslo", "tromso"]
    assert {site.state for site in file.status.sites} == {"here", "answered", "left out"}


def test_who_went_away_is_absent(run: RunFolder, file: StatusFile) -> None:
    opened(file, run)
    file.waiting(Waiting(COMING_BACK, ("bergen",), ("oslo", "tromso"), 0, 3.0, 60.0))
    states = {site.name: site.state for site in file.status.sites}
    assert (states["oslo"], states["tromso"]) == ("absent", "absent")
    file.waiting(Waiting(COMING_BACK, ("bergen", "oslo"), ("tromso",), 0, 4.0, 59.0))
    assert file.status.site("oslo").state == "answered"


def test_a_damaged_status_is_begun_anew(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    (run.path / "status.json").write_text("{")
    StatusFile(RunObserver(), run.path, rounds=3, needed=2)
    assert read_status(run.path).live is not None
    assert "event=status-begun-anew" in caplog.text


def test_following_ends_with_the_run(run: RunFolder, file: StatusFile) -> None:
    file.run_failed("no disk")
    said = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["status", str(run.path), "--watch"])
    assert (said.exit_code, said.output) == (1, "failed after round 2 of 3: no disk\n")


def test_a_status_that_is_damaged(run: RunFolder) -> None:
    (run.path / "status.json").write_text("{")
    with pytest.raises(UsageError, match=r"status\.json cannot be read"):
        read_status(run.path)


def test_a_loop_over_the_exit_code_ends_at_a_mistyped_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--json"], ["--watch"]):
        monkeypatch.setattr("sys.argv", ["bouquet", "status", str(tmp_path / "mistyped"), *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 3  # 2 would say that it goes on
        assert "is no folder of a run" in capsys.readouterr().err


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder of a run"):
        read_status(tmp_path)
    (tmp_path / "config.toml").write_text("rounds = 1\n[strategy]\nname = 'flora'\n")
    (tmp_path / "rounds.jsonl").write_text(json.dumps({"round": 0})[:-3] + "\n")
    with pytest.raises(UsageError, match=r"rounds.jsonl is damaged"):
        read_status(tmp_path)
