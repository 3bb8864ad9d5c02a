"""A stranger's words are cut and escaped wherever a person reads them: log, screen, page."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from rich.console import Console

from commands.display import Display
from server.progress import LogObserver, RunObserver, observe_run
from server.rounds import run_rounds
from tests.conftest import Run
from tests.fake_clients import fake_app, fake_grid, settings_of

WORDS = "\x1b[2J\x9b31m\x07\u202e\u2066[/red]<script>alert(1)</script>\r\n\u2028" + "!" * 10**6
SHOWN = r"\x1b[2J\x9b31m\x07\u202e\u2066[/red]<script>alert(1)</script>\r\n\u2028!!!"


def play(folder: Path, observer: RunObserver) -> None:
    """Client 1 fails a query with these words, 2 in training, 3 in an evaluation; 0 is honest."""
    failing = {1: "query", 2: "train", 3: "evaluate"}

    def tamper(client: int, message: Message, reply: Message) -> Message:
        if failing.get(client) != message.metadata.message_type:
            return reply
        words: Any = {"client": WORDS, "reason": WORDS, WORDS: WORDS}
        return Message(RecordDict({"failure": ConfigRecord(words)}), reply_to=message)

    settings = settings_of(
        folder, clients__count=4, lora__rank="2", rounds=2, evaluate__clients=True
    )
    with observe_run(observer):
        run_rounds(fake_grid(settings, fake_app(tamper=tamper)), settings)


def assert_harmless(text: str, times: int, shown: str = SHOWN) -> None:
    """So many times the words are there, escaped; no line is long, no character obeyed."""
    assert text.count(shown) == times
    odd = {c for c in text if not c.isprintable()} - {"\n"}
    assert not odd
    assert max(map(len, text.splitlines())) < 1000


def test_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="bouquet"):
        play(tmp_path / "run", LogObserver())
    in_json = SHOWN.replace("\\", r"\\")
    assert_harmless("\n".join(record.getMessage() for record in caplog.records), 6, in_json)


@pytest.mark.parametrize("terminal", [True, False])
def test_on_the_terminal(tmp_path: Path, terminal: bool) -> None:
    text = io.StringIO()
    console = Console(
        file=text, width=2000, force_terminal=terminal, color_system=None, legacy_windows=False
    )
    display = Display(console)
    play(tmp_path / "run", display)
    if terminal:
        console.print(display._render())
    assert_harmless(text.getvalue(), 6)


def test_in_the_status_and_on_the_page(tmp_path: Path, bouquet: Run) -> None:
    play(tmp_path / "run", LogObserver())
    code, out, _ = bouquet("status", str(tmp_path / "run"))
    assert code == 0
    assert_harmless(out, 6)
    code, _, _ = bouquet("report", str(tmp_path / "run"), "--output", str(tmp_path / "page"))
    assert code == 0
    for page in (tmp_path / "page").glob("*.html"):
        text = page.read_text()
        assert "alert(1)" not in text.replace("&lt;script&gt;alert(1)", "")
        assert not {c for c in text if not c.isprintable()} - {"\n"}
    assert list((tmp_path / "page").glob("*.html"))


def texts_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.items() for each in item for text in texts_in(each)]
    if isinstance(value, list):
        return [text for each in value for text in texts_in(each)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("file", ["status.json", "rounds.jsonl"])
def test_in_the_files_that_programs_read(tmp_path: Path, file: str) -> None:
    play(tmp_path / "run", LogObserver())
    written = (tmp_path / "run" / file).read_text()
    lines = written.splitlines() if file.endswith("l") else [written]
    said = texts_in([json.loads(line) for line in lines])
    assert any(SHOWN in text for text in said)
    assert all(text.isprintable() and len(text) < 1000 for text in said)
