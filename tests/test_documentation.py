"""What the documentation shows, runs."""

import re
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import ServerApp

from core.errors import BouquetError, UsageError
from journal.state import load_state
from server.flower_strategy import FlowerStrategy
from server.rounds import run_rounds
from settings.keys import flatten
from settings.run import RunSettings, default_values
from strategies.registry import STRATEGIES, knobs_in, make_strategy
from tests.dense_oracle import dense_deltas, distance, frobenius
from tests.fake_clients import fake_app, fake_grid, settings_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_the_table_of_strategies_says_what_the_code_declares(name: str) -> None:
    promised = make_strategy(name).properties
    page = (ROOT / "docs" / "strategies.md").read_text()
    rows = [
        line for line in page.splitlines() if line.startswith((f"| [`{name}`]", f"| `{name}` |"))
    ]
    words = {True: "yes", False: "no"}
    flags = [words[f] for f in (promised.mixed_ranks, promised.exact, promised.sums_only)]
    up, down = f"`{promised.bytes_up}`", f"`{promised.bytes_down}`"
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[1:] == [f"{promised.title}, {promised.source}", *flags, up, down]
    assert (ROOT / "docs" / cells[0].partition("(")[2].rstrip(")")).is_file()
    assert rows[1] == f"| `{name}` | {promised.reveals} |"


def python_block(page: str) -> str:
    found = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def context_of(settings: RunSettings) -> Context:
    return Context(1, 1, {}, RecordDict(), flatten(settings))


@pytest.mark.parametrize("strategy", ["flora", "flora-warm", "zero-padding", "hetlora"])
def test_the_serverapp_of_ones_own_ends_where_bouquets_does(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(python_block("docs/flower.md"), names)
    app: ServerApp = names["app"]
    settings = settings_of(tmp_path / "own", strategy__name=strategy, clients__fraction=0.6)
    app(fake_grid(settings), context_of(settings))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

    shell = FlowerStrategy(settings)
    result = shell.start(fake_grid(settings), ArrayRecord(), num_rounds=settings.rounds)
    assert result.arrays is not None
    run_rounds(fake_grid(settings), settings)
    state = load_state(tmp_path / "own" / "state")
    assert state is not None
    total = state.model.total()
    assert total is not None
    expected = dense_deltas(total)  # there in pieces, here whole: the same but for rounding
    found = dense_deltas(shell.adapter(result.arrays))
    assert distance(found, expected) <= 2e-6 * frobenius(expected)
    noise = result.train_metrics_clientapp[settings.rounds]["aggregation-noise"]
    assert isinstance(noise, float)
    assert (noise < 1e-6) == strategy.startswith("flora")


def test_the_shell_evaluates_on_clients_and_takes_overrides(tmp_path: Path) -> None:
    told: list[Any] = []

    def listen(client: int, message: Message, reply: Message) -> Message:
        if "adapter" in reply.content:
            told.append(message.content["instruction"]["local.epochs"])
        return reply

    settings = settings_of(tmp_path / "run", evaluate__clients=True)
    result = FlowerStrategy(settings).start(
        fake_grid(settings, fake_app(tamper=listen)),
        ArrayRecord(),
        num_rounds=1,
        train_config=ConfigRecord({"local.epochs": 7}),
    )
    assert told == [7, 7, 7]
    assert result.evaluate_metrics_clientapp[1]["client-held-out-loss"] == pytest.approx(2.0)


def test_the_shell_refuses_what_the_strategy_cannot_take(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "run", strategy__name="fedavg")
    with pytest.raises(UsageError, match="needs one rank for all clients"):
        FlowerStrategy(settings).start(fake_grid(settings), ArrayRecord(), num_rounds=1)
    with pytest.raises(BouquetError, match="no round has run"):
        FlowerStrategy(settings).adapter(ArrayRecord())


def test_pages_name_only_keys_and_files_that_exist() -> None:
    keys = set(default_values()) | {
        f"strategy.{knob}" for name in STRATEGIES for knob, _, _ in knobs_in(name)
    }
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        for section, name in re.findall(r"`(?:--set )?([a-z]+)\.([a-z][a-z-]+)[`=]", text):
            if section in sections and name not in ("py", "md", "app", "json"):
                assert f"{section}.{name}" in keys, f"{page.name} names {section}.{name}"
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
