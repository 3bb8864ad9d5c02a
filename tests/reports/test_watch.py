"""The live page: what it says follows the run, and nobody without the token sees it.

A real server on the loopback interface and a real headless browser; the run is a real folder whose
status is written while the page is open.
"""

import json
import math
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import uvicorn

from commands.watch_command import shown_in_browser
from core.errors import UsageError
from journal.run_folder import RunFolder
from journal.status import read_status
from reports.watch_app import watch_app
from server import progress
from server.admission import Rejection
from server.roster import Roster
from server.status_file import StatusFile
from server.waiting import Waiting
from settings.run import run_settings
from tests.fake_clients import member_named
from tests.reports.browser import CHROMIUM, Browser

TOKEN = "a-token"
ROOT = Path(__file__).resolve().parents[2]
SAYS = "document.getElementById('says').innerText"
EVIL = "<img src=x onerror=document.title='owned'>\x1b[2J"
MEMBERS = [
    member_named(name, 10 + number, 4, number=number, num_examples=300)
    for number, name in enumerate(["bergen", "oslo"])
]


class Quiet(progress.RunObserver):
    """Cares for nothing."""


class Page:
    """A run, what writes its status, and the page about it."""

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder(folder)
        self.folder.create(run_settings({"rounds": 2, "output": str(folder)}))
        self.lock = ExitStack()
        self.lock.enter_context(self.folder.locked())
        self.status = StatusFile(Quiet(), folder, rounds=2, needed=2)
        config = uvicorn.Config(
            watch_app(folder, TOKEN),
            port=0,
            log_level="error",
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.cookies = {f"bouquet-watch-{port}": TOKEN}

    def play(self) -> None:
        """One round, in which oslo fails with words that are no words."""
        left_out = {"narvik": "has another base"}
        self.status.run_opened(self.folder.path, Roster(MEMBERS, "base", {}, left_out), 0, 2)
        self.status.round_started(1, MEMBERS)
        client = {
            "client": "bergen",
            "rank": 4,
            "num_examples": 300,
            "train_seconds": 2.5,
            "bytes_up": 1_500_000,
            "bytes_down": 3_000_000,
            "loss": 2.25,
            "change_norm": 0.125,
        }
        record = {
            "round": 1,
            "train_loss": 2.25,
            "held_out_loss": 2.125,
            "held_out_accuracy": 0.75,
            "bytes_up": 1_500_000,
            "bytes_down": 3_000_000,
            "seconds": 12.0,
            "clients": [client],
            "failures": [{"client": "oslo", "reason": EVIL}],
        }
        self.folder.append({"round": 0, "held_out_loss": 3.5})
        self.folder.append(record)
        self.status.round_finished(record, [Rejection("oslo", EVIL)])

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    page = Page(tmp_path / "run")
    with page.lock:
        yield page
    page.close()


def test_without_the_token_there_is_nothing(page: Page) -> None:
    for path in ("/", "/events", "/?token=other"):
        assert httpx.get(f"{page.address}{path}").status_code == 403
    first = httpx.get(f"{page.address}/?token={TOKEN}")
    assert (first.status_code, first.headers["location"]) == (303, "/")
    assert {"httponly", "samesite=lax"} <= set(first.headers["set-cookie"].lower().split("; "))
    assert httpx.get(f"{page.address}/", cookies=first.cookies).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80"])
def test_another_host_is_refused(page: Page, host: str) -> None:
    answer = httpx.get(f"{page.address}/?token={TOKEN}", headers={"host": host})
    assert answer.status_code == 400


def test_the_page_is_whole_and_may_load_nothing(page: Page) -> None:
    answer = httpx.get(f"{page.address}/", cookies=page.cookies)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert not re.search(r"(src|href)=\"(?!#|data:)", answer.text)
    assert not re.search(r"@[A-Z]+@", answer.text)


def test_events_tell_what_has_changed_and_no_more(page: Page) -> None:
    with httpx.stream("GET", f"{page.address}/events", cookies=page.cookies) as stream:
        lines = stream.iter_lines()
        first = [next(lines) for _ in range(9)]
        assert [line for line in first if line.startswith("event")] == [
            "event: config",
            "event: rounds",
            "event: status",
        ]
        assert json.loads(first[7].removeprefix("data: "))["state"] == "waiting"
        page.play()
        told: dict[str, str] = {}
        while '"rounds_done": 1' not in told.get("status", ""):
            name = next(lines).removeprefix("event: ")
            told[name] = next(lines)
            next(lines)
        assert "config" not in told
        words = json.loads(told["status"].removeprefix("data: "))["sites"][2]["words"]
        assert words.endswith(r"\x1b[2J")


def test_a_status_without_numbers_is_told_and_odd_names_are_escaped(page: Page) -> None:
    path = page.folder.path / "status.json"
    page.play()
    told = json.loads(path.read_text())
    told["sites"][0]["name"] = "a\u202eb"
    path.write_text(json.dumps(told))
    assert read_status(page.folder.path).document()["sites"][0]["name"] == r"a\u202eb"
    told["loss"] = math.nan
    path.write_text(json.dumps(told))
    with pytest.raises(UsageError, match="holds NaN, which is no number"):
        read_status(page.folder.path)


def test_ctrl_c_ends_the_page_with_one_line_while_it_is_open(page: Page) -> None:
    command = [sys.executable, "-m", "bouquet", "watch", str(page.folder.path), "--no-open"]
    with (
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as started,
        httpx.Client(follow_redirects=True) as client,
    ):
        assert started.stdout is not None
        address = started.stdout.readline().split()[-1]
        client.get(address)
        with client.stream("GET", address.partition("?")[0] + "events") as stream:
            next(stream.iter_lines())
            started.send_signal(signal.SIGINT)
            said = started.stdout.read()
        assert (started.wait(), said.splitlines()[-1]) == (0, "the page is closed")
        assert "Traceback" not in said


def test_a_damaged_folder_is_told(page: Page) -> None:
    (page.folder.path / "status.json").write_text("{")
    with httpx.stream("GET", f"{page.address}/events", cookies=page.cookies) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert "status.json cannot be read" in json.loads(next(lines)[6:])["says"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rounds.jsonl", "[1]\n"),
        ("rounds.jsonl", '{"round": 1, "clients": [{}], "seconds": 1}\n'),
        ("status.json", '{"format": "bouquet-status-1", "sites": [], "phase_since": "soon"}'),
    ],
)
def test_whatever_damage_there_is_the_page_says_it(page: Page, name: str, text: str) -> None:
    (page.folder.path / name).write_text(text)
    with httpx.stream("GET", f"{page.address}/events", cookies=page.cookies) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert re.search("damaged|cannot be read", json.loads(next(lines)[6:])["says"])


def test_the_token_is_no_argument_of_the_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every user of a machine can read the arguments of every process."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with shown_in_browser("http://127.0.0.1:8800/?token=secret"):
        (address,) = opened
        path = Path(address.removeprefix("file://"))
        assert "secret" not in address
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert 'url=http://127.0.0.1:8800/?token=secret"' in path.read_text()
    assert not path.exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser_the_file_leads_to_the_page(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = Browser(tmp_path / "browser", 1280, 900)
    monkeypatch.setattr("webbrowser.open", browser.open)
    try:
        with shown_in_browser(f"{page.address}/?token={TOKEN}"):
            browser.wait_for(f"({SAYS} || '').startsWith('alive: asking who is there')")
            assert "token" not in browser.value("location.href")
    finally:
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_in_a_browser_the_page_follows_the_run(
    page: Page, width: int, dark: bool, tmp_path: Path
) -> None:
    page.status.waiting(Waiting("answers of sites", ("bergen",), ("node 12",), 0, 40.0, 560.0))
    browser = Browser(tmp_path / "browser", width, 900, dark)
    try:
        browser.open(f"{page.address}/?token={TOKEN}")
        browser.wait_for(f"{SAYS}.startsWith('alive: asking who is there; waiting for node 12')")
        assert browser.value("document.body.dataset.state") == "waiting"
        page.play()
        browser.wait_for(f"{SAYS}.startsWith('alive: round 1 of 2, between rounds')")
        browser.wait_for("document.querySelectorAll('#rounds tbody tr').length == 2")
        rows = "[...document.querySelectorAll('#sites tbody tr')].map(row => row.innerText)"
        bergen, narvik, why, oslo, words = browser.value(rows)
        assert bergen.split("\t")[:2] == ["bergen", "answered"]
        assert bergen.split("\t")[3:] == [
            *("4", "300", "1.5 MB", "3.0 MB", "2.5", "0.125", "2.2500", "\u2013"),
        ]
        assert (narvik.split("\t")[1], why) == ("left out", "has another base")
        assert oslo.split("\t")[1] == "failed"
        assert words == "round 1: " + EVIL.replace("\x1b", r"\x1b")
        assert browser.value("document.images.length") == 0
        assert "owned" not in browser.value("document.title")
        assert browser.value("document.querySelectorAll('polyline').length") == 2
        assert browser.value("document.getElementById('loss-title').innerText").endswith("2.1250")
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.value(wide) == 0
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
        browser.press("Tab")
        assert browser.value("document.activeElement.className") == "skip"
        page.status.run_failed("no space left on device")
        page.lock.close()
        browser.wait_for("document.body.dataset.state == 'failed'")
        assert browser.value(SAYS) == "failed after round 1 of 2: no space left on device"
        assert browser.errors == []
        assert {httpx.URL(url).host for url in browser.requested if url[:4] == "http"} == {
            "127.0.0.1"
        }
        page.close()
        browser.wait_for("!document.getElementById('link').hidden")
    finally:
        browser.close()
