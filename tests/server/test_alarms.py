"""A textfile that Prometheus reads, and a command that is told of a failure and obeys nobody."""

import os
import shlex
import stat
import sys
from pathlib import Path

import pytest

from core.errors import BouquetError, UsageError
from journal.live_status import FAILED, LiveStatus, SiteStatus
from server.alarms import Alarms
from server.rounds import run_rounds
from settings.federation import StatusSettings
from tests.fake_clients import fake_grid, settings_of

NOW = "2026-01-02T03:04:05Z"
EVIL = '"; rm -rf ~ #\nbouquet_round 7'


def status(**values: object) -> LiveStatus:
    site = SiteStatus(EVIL, state="failed", failures=2, bytes_up=10)
    return LiveStatus(updated=NOW, rounds=3, sites=[site], **values)  # type: ignore[arg-type]


def samples(path: Path) -> dict[str, float]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_the_textfile(tmp_path: Path) -> None:
    path = tmp_path / "bouquet.prom"
    told = status(state="running", round=2, loss=1.5, waiting_for=["oslo"], waiting_for_more=1)
    Alarms(StatusSettings(str(path), ""), tmp_path / "trial")(told)
    found = samples(path)
    assert found['bouquet_run_state{run="trial",state="running"}'] == 1.0
    assert found['bouquet_run_state{run="trial",state="failed"}'] == 0.0
    assert found['bouquet_silent_sites{run="trial"}'] == 2.0
    assert found['bouquet_held_out_loss{run="trial"}'] == 1.5
    assert found['bouquet_updated_timestamp_seconds{run="trial"}'] == 1767323045.0
    escaped = r'bouquet_site_failures{run="trial",site="\"; rm -rf ~ #\\nbouquet_round 7"}'
    assert found[escaped] == 2.0
    assert "bouquet_round 7" not in path.read_text().splitlines()
    assert list(tmp_path.iterdir()) == [path]


def test_the_exporter_may_read_what_a_private_server_writes(tmp_path: Path) -> None:
    path = tmp_path / "bouquet.prom"
    before = os.umask(0o077)
    try:
        Alarms(StatusSettings(str(path), ""), tmp_path / "trial")(status())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_label_has_only_the_escapes_that_prometheus_knows(tmp_path: Path) -> None:
    path = tmp_path / "bouquet.prom"
    told = LiveStatus(updated=NOW, sites=[SiteStatus("a\tb\x1b\udce9c")])
    Alarms(StatusSettings(str(path), ""), tmp_path / "trial")(told)
    assert r'bouquet_site_failures{run="trial",site="a\\tb\\x1b\\udce9c"}' in samples(path)


def test_a_textfile_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Alarms(StatusSettings(str(tmp_path / "none" / "x.prom"), ""), tmp_path)(status())
    assert "event=prometheus-not-written" in caplog.text


def test_a_run_that_fails_runs_the_command_once(tmp_path: Path) -> None:
    told = tmp_path / "told"
    script = "import os, sys; print(*sys.argv[1:], os.environ['BOUQUET_STATE'], "
    script += f"os.environ['BOUQUET_WORDS'], file=open({str(told)!r}, 'a'))"
    command = shlex.join([sys.executable, "-c", script, "$HOME"])
    settings = settings_of(tmp_path / "run", strategy__name="fedavg", status__notify=command)
    with pytest.raises(BouquetError, match="one rank for all clients"):
        run_rounds(fake_grid(settings), settings)
    (line,) = told.read_text().splitlines()
    assert line.startswith("$HOME failed no client can take part: 3 kinds of sites")


def test_a_start_that_is_refused_runs_the_command_and_leaves_the_run_as_it_is(
    tmp_path: Path,
) -> None:
    told = tmp_path / "told"
    settings = settings_of(tmp_path / "run", rounds=1)
    run_rounds(fake_grid(settings), settings)
    before = (tmp_path / "run" / "status.json").read_bytes()
    script = f"import os; open({str(told)!r}, 'a').write(os.environ['BOUQUET_WORDS'])"
    again = settings_of(
        tmp_path / "run",
        rounds=2,
        resume=True,
        lora__alpha=99.0,
        status__notify=shlex.join([sys.executable, "-c", script]),
    )
    with pytest.raises(UsageError, match="keeps its configuration"):
        run_rounds(fake_grid(again), again)
    assert "keeps its configuration, but lora.alpha was" in told.read_text()
    assert (tmp_path / "run" / "status.json").read_bytes() == before


def test_a_command_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failed = status(state=FAILED, failure="no disk")
    Alarms(StatusSettings("", "no-such-command --x"), tmp_path)(failed)
    assert "event=notify-failed" in caplog.text
