"""The page of a comparison: complete, self-contained, true to the records, safe against names."""

import csv
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from journal.results import Run, summary_rows
from reports.figure_data import line_up
from reports.figure_style import styled
from reports.page import MOST_ROWS, write_report
from reports.page_summary import table
from reports.page_verdict import verdict
from strategies.registry import STRATEGIES, make_strategy
from tests.reports.synthetic_runs import synthetic_run

SMALL: dict[str, Any] = {"rounds": 3, "clients": 4, "modules": 8}
REASON = "fedavg needs one rank for all clients, but they train 2 different ranks"
EVIL = '<script>alert("x")</script>$\\frac{'
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """What a page loads, names and says."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.headings: list[int] = []
        self.unlabelled = 0
        self._inside: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        for key in ("src", "href", "xlink:href", "srcset", "data"):
            if found.get(key) is not None:
                (self.links if tag == "a" else self.loaded).append(str(found[key]))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "svg" and not (found.get("aria-label") or found.get("aria-hidden")):
            self.unlabelled += 1
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & {*self._inside[-1:]}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make_runs(folder: Path, names: Sequence[str], seeds: int = 2, **options: Any) -> list[Run]:
    return [
        synthetic_run(folder / name / str(seed), name, seed, **{**SMALL, **options})
        for name in names
        for seed in range(seeds)
    ]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Run]]:
    """A report of every strategy, of which one was refused, and both references."""
    folder = tmp_path_factory.mktemp("compared")
    runs = [
        replace(run, rounds=[], failure=REASON) if run.name == "fedavg" else run
        for run in make_runs(folder, [*STRATEGIES, "central", "local"])
    ]
    return write_report(folder, runs), runs


def rows_of(page: Path, name: str) -> list[dict[str, str]]:
    with (page.parent / "figures" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_strategy_is_on_the_page_and_the_refused_one_says_why(
    compared: tuple[Path, list[Run]],
) -> None:
    page = Page(compared[0])
    for name in STRATEGIES:
        properties = make_strategy(name).properties
        assert properties.title in page.text
        assert properties.source in page.text
    assert "Central LoRA" in page.text
    assert page.text.count(REASON) >= 3  # verdict, table, and how it was run
    assert compared[0].stat().st_size < 2_000_000


def test_nothing_is_loaded_from_elsewhere(compared: tuple[Path, list[Run]]) -> None:
    page = Page(compared[0])
    assert all(url.startswith(("data:", "#")) for url in page.loaded)
    assert not re.search(r"@import|url\((?!#)", page.source)
    assert all((compared[0].parent / url).is_file() for url in page.links if url[0] != "#")
    assert all(url[1:] in page.ids for url in page.links if url[0] == "#")


def test_ids_are_unique_figures_are_labelled_and_headings_in_order(
    compared: tuple[Path, list[Run]],
) -> None:
    page = Page(compared[0])
    assert len(page.ids) == len(set(page.ids))
    assert page.unlabelled == 0
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    steps = zip(page.headings, page.headings[1:], strict=False)
    assert all(after <= before + 1 for before, after in steps)
    referred = set(re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', page.source))
    assert referred <= set(page.ids)


def test_each_figure_has_its_files_and_its_numbers_in_the_page(
    compared: tuple[Path, list[Run]],
) -> None:
    path, _ = compared
    page = Page(path)
    names = [found.removeprefix("figure-") for found in page.ids if found.startswith("figure-")]
    assert {"loss-rounds", "loss-bytes", "loss-seconds", "client-loss-rounds"} <= {*names}
    assert {
        "change",
        "aggregation-noise",
        "noise-of-modules",
        "rank-spectrum",
        "effective-rank",
    } <= {*names}
    assert {"clients-loss", "client-similarity", "bytes", "seconds"} <= {*names}
    for name in names:
        assert (path.parent / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        rows = rows_of(path, name)
        assert f"{len(rows)} row" in page.text
        assert (f"of {len(rows)} rows" in page.text) == (len(rows) > MOST_ROWS)


def test_the_numbers_of_figures_are_those_of_the_records(
    compared: tuple[Path, list[Run]],
) -> None:
    path, runs = compared
    records = {(r.name, str(r.seed), str(x["round"])): x for r in runs for x in r.rounds}
    for name, key in {
        "loss-rounds": "held_out_loss",
        "loss-bytes": "held_out_loss",
        "client-loss-rounds": "client_held_out_loss",
        "aggregation-noise": "aggregation_noise",
        "loss-before-rounds": "loss_before_aggregation",
        "effective-rank": "effective_rank",
        "bytes": "bytes_down",
    }.items():
        rows = rows_of(path, name)
        assert {row["strategy"] for row in rows} >= {"flora", "zero-padding"}
        for row in rows:
            record = records[row["strategy"], row["seed"], row["round"]]
            assert float(row[key]) == record[key]
    for row in rows_of(path, "noise-of-modules"):
        record = records[row["strategy"], row["seed"], "3"]
        assert float(row["module_noise"]) == record["module_noise"][row["module"]]
    for row in rows_of(path, "client-similarity"):
        cosine = records[row["strategy"], row["seed"], row["round"]]["cosine"]
        at, other = (int(row[key].removeprefix("client-")) for key in ("client", "other"))
        assert float(row["cosine"]) == cosine[at][other]
    last = [row for row in rows_of(path, "loss-bytes") if row["round"] == "3"]
    for row in (row for row in last if row["strategy"] in STRATEGIES):
        own = [records[row["strategy"], row["seed"], str(at)] for at in (1, 2, 3)]
        assert float(row["bytes_so_far"]) == sum(r["bytes_up"] + r["bytes_down"] for r in own)


def test_the_size_of_change_stands_beside_the_loss_and_is_drawn_for_each_client(
    compared: tuple[Path, list[Run]],
) -> None:
    path, runs = compared
    rows = rows_of(path, "change")
    records = {(r.name, str(r.seed), str(x["round"])): x for r in runs for x in r.rounds}
    for row in rows:
        record = records[row["strategy"], row["seed"], row["round"]]
        sizes = {client["client"]: client["change_norm"] for client in record["clients"]}
        sizes["mean"] = record["mean_change_norm"]
        assert float(row["change_norm"]) == sizes[row["client"]]
    assert {row["client"] for row in rows} == {*(f"client-{k:02d}" for k in range(4)), "mean"}
    assert {row["strategy"] for row in rows} == {*STRATEGIES} - {"fedsa-lora", "fedavg"}
    page = Page(path)
    assert re.search(r"held-out loss from base size of change clients' mean", page.text)
    means = [[x["mean_change_norm"] for x in r.rounds[1:]] for r in runs if r.name == "flora"]
    assert f"{sum(map(sum, means)) / 6:.3g}" in page.text  # two seeds of three rounds


def test_many_clients_are_a_range_and_not_many_lines(tmp_path: Path) -> None:
    few = write_report(tmp_path / "few", make_runs(tmp_path, ["flora"], 1, clients=40))
    many = write_report(tmp_path / "many", make_runs(tmp_path, ["flora"], 1, clients=41))
    words = "Of more than 40 clients the shade is the range."
    assert words not in Page(few).text
    assert words in Page(many).text


def test_what_the_server_cannot_know_is_a_gap_and_no_zero(tmp_path: Path) -> None:
    run = make_runs(tmp_path, ["flora"], 1, rounds=5, state=False)[0]
    unknown = {"aggregation_noise": None, "mean_change_norm": None, "effective_rank": None}
    rounds = [{**r, **unknown} if r["round"] == 3 else r for r in run.rounds]
    path = write_report(tmp_path, [replace(run, rounds=rounds)])
    note = "Not known to the server, and so not drawn: FLoRA."
    assert Page(path).text.count(note) == 3
    for name in ("aggregation-noise", "effective-rank"):
        rows = rows_of(path, name)
        assert [row[name.replace("-", "_")] == "" for row in rows] == [
            *(False, False, True, False, False)
        ]
    from reports.figure_change import change_plot
    from reports.figure_curves import effective_rank_plot, noise_plot

    for make, part in ((noise_plot, "line"), (effective_rank_plot, "line"), (change_plot, "mean")):
        plot = make(line_up([replace(run, rounds=rounds)]))
        assert plot is not None
        (axes,) = plot.figure.axes
        (line,) = (each for each in axes.lines if str(each.get_gid()).endswith(f"-{part}"))
        drawn = dict(zip(*(line.get_data()[k].tolist() for k in (0, 1)), strict=True))
        assert [at for at in range(1, 6) if math.isnan(drawn[at])] == [3]
    assert "<td>-</td>" in path.read_text()
    nothing = [{**r, **unknown} if r["round"] else r for r in run.rounds]
    everywhere = Page(write_report(tmp_path / "none", [replace(run, rounds=nothing)]))
    assert "figure-aggregation-noise" not in everywhere.ids


def test_a_run_of_an_earlier_bouquet_says_that_its_noise_is_another(tmp_path: Path) -> None:
    new, run = make_runs(tmp_path, ["rbla", "flora"], 1, state=False)
    gone = ("noise_relative_to_model",)
    rounds = [{k: v for k, v in r.items() if k not in gone} for r in run.rounds]
    page = Page(write_report(tmp_path, [new, replace(run, rounds=rounds)]))
    assert page.text.count("The noise of FLoRA was written by an earlier version of Bouquet") >= 2
    assert "earlier version" not in Page(write_report(tmp_path / "new", [new])).text


def test_one_run_makes_a_page_without_words_of_comparison(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, make_runs(tmp_path, ["flora"], seeds=1)))
    assert "One seed says little" in page.text
    assert "perplexity" in page.text
    for word in ("compared", "lowest", "Bold", "show all", "differ in"):
        assert word not in page.text
    assert 'class="chip"' not in page.source


def test_classification_is_ranked_by_accuracy(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, ["flora", "ffa-lora", "fedsa-lora"], classify=True, state=False)
    page = Page(write_report(tmp_path, runs))
    assert "highest held-out accuracy" in page.text
    assert {"figure-accuracy-rounds", "figure-macro-f1-rounds", "figure-clients-accuracy"} <= {
        *page.ids
    }


def test_without_evaluation_at_the_server_the_clients_decide(tmp_path: Path) -> None:
    runs = [
        replace(
            run, rounds=[{k: v for k, v in r.items() if k != "held_out_loss"} for r in run.rounds]
        )
        for run in make_runs(tmp_path, ["flora", "rbla", "local"], state=False)
    ]
    said = " ".join(verdict(summary_rows(runs), line_up(runs)))
    assert "lowest mean loss, by tokens, on the clients' own held-out examples" in said
    assert "Local only, for reference, reaches" in said


def test_the_clients_mean_is_that_of_the_records_weighted_by_tokens(tmp_path: Path) -> None:
    def ended(name: str, *losses: float) -> Run:
        run = make_runs(tmp_path, [name], seeds=1, state=False)[0]
        own = [
            {"client": f"client-{k}", "loss": loss, "tokens": tokens}
            for k, (loss, tokens) in enumerate(zip(losses, (300, 100), strict=True))
        ]
        mean = (3 * losses[0] + losses[1]) / 4
        last = {"round": 1, "client_held_out": own, "client_held_out_loss": mean}
        end = {key: value for key, value in run.rounds[1].items() if key != "held_out_loss"}
        return replace(run, rounds=[{"round": 0}, {**end, **last}])

    runs = [ended("fedsa-lora", 1.0, 4.0), ended("local", 2.0, 2.5)]  # the plain means disagree
    rows = summary_rows(runs)
    assert [row.name for row in rows] == ["fedsa-lora", "local"]
    said = " ".join(verdict(rows, line_up(runs)))
    words = "mean loss, by tokens, on the clients' own held-out examples"
    assert f"After 1 round FedSA-LoRA has a {words} of 1.7500" in said
    assert "Local only, for reference, reaches 2.1250, 0.3750 worse" in said
    page = Page(write_report(tmp_path, runs))
    columns, lines, _ = table(rows, line_up(runs))
    place = [column.heading for column in columns].index("clients' mean")
    assert [line.cells[place].text for line in lines] == ["1.7500", "2.1250"]
    assert "their mean loss is weighted by tokens" in page.text


def test_a_run_without_a_global_model_has_no_dot_in_its_name(tmp_path: Path) -> None:
    personal, other = make_runs(tmp_path, ["fedsa-lora", "flora"], seeds=1, state=False)
    rounds = [{**personal.rounds[0], "held_out_loss": 4.8}, *personal.rounds[1:]]
    personal = replace(personal, rounds=rounds)
    alone = Page(write_report(tmp_path / "alone", [personal]))
    assert "figure-loss-rounds" not in alone.ids
    assert "figure-client-loss-rounds" in alone.ids
    assert "Without a global model there is no held-out loss of one over rounds" in alone.text
    for words in ("Aggregation noise", "The size of the clients' changes"):
        said = f"{words}: not known to the server, and so not drawn: FedSA-LoRA"
        assert said in alone.text
    path = write_report(tmp_path / "both", [personal, other])
    assert {row["strategy"] for row in rows_of(path, "loss-rounds")} == {"flora"}
    both = Page(path)
    assert "Without a global model, and so not drawn: FedSA-LoRA" in both.text
    assert "there is no held-out loss of one" not in both.text


def test_the_largest_changes_are_whole_markers(tmp_path: Path) -> None:
    from reports.figure_change import change_plot

    runs = make_runs(tmp_path, ["flora", "rbla", "ideal"], seeds=1, state=False)
    for run in runs:  # nearly alike, so that a margin of their range is none of the axis
        for record in run.rounds[1:]:
            record["mean_change_norm"] = 4.0 + 0.01 * record["round"]
            for client in record["clients"]:
                client["change_norm"] = record["mean_change_norm"]
    with styled():
        plot = change_plot(line_up(runs))
        assert plot is not None
        plot.figure.draw_without_rendering()
    per_point = plot.figure.dpi / 72.0
    for axes in filter(lambda each: each.lines, plot.figure.axes):
        top = axes.get_window_extent().y1
        for line in axes.lines:
            highest = axes.transData.transform((0.0, max(map(float, line.get_ydata()))))[1]
            assert highest + 0.5 * line.get_markersize() * per_point <= top


def test_the_rate_that_was_chosen_stands_in_the_summary(tmp_path: Path) -> None:
    run, other = make_runs(tmp_path, ["flora", "rbla"], seeds=1, state=False)
    tuning = {"seed": 7, "metric": "held_out_loss", "chosen": 0.003, "at_end_of_list": False}
    trials = [{"rate": rate, "loss": 2.0, "failure": None} for rate in (0.001, 0.003)]
    runs = [replace(run, tuning={**tuning, "trials": trials}), other]
    columns, lines, _ = table(summary_rows(runs), line_up(runs))
    assert columns[0].heading == "rate"
    assert {line.series.name: line.cells[0].text for line in lines} == {
        "flora": "0.003",
        "rbla": "",
    }
    columns, _, _ = table(summary_rows([run]), line_up([run]))
    assert "rate" not in {column.heading for column in columns}


def bare(run: Run, rounds: Sequence[dict[str, Any]]) -> Run:
    return replace(run, rounds=rounds, config={}, versions={})


def test_records_that_lack_almost_everything_still_make_a_page(tmp_path: Path) -> None:
    run = make_runs(tmp_path, ["flora"], seeds=1, state=False)[0]
    odd = {"held_out_loss": None, "bytes_up": float("nan"), "cosine": [[1.0]], "clients": None}
    cases: list[list[dict[str, Any]]] = [
        [],
        [{"round": 0}],
        [{"round": 0}, {"round": 1, **odd}],
        [{"round": 0, "held_out_loss": 2.0}, {"round": 2, "held_out_loss": 1.0}],
        [{"round": 1, "aggregation_noise": 0.0, "module_noise": {"q": 0.0}, "seconds": 1.0}],
    ]
    for number, rounds in enumerate(cases):
        page = Page(write_report(tmp_path / str(number), [bare(run, rounds)]))
        assert "FLoRA" in page.text
    others = [replace(bare(run, rounds), seed=seed) for seed, rounds in enumerate(cases)]
    named = [replace(each, name="mine") for each in others]
    assert "mine" in Page(write_report(tmp_path / "all", [*others, *named])).text


def test_names_and_reasons_cannot_leave_their_place(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, ["flora", "rbla"], seeds=1, state=False)
    records = [
        {
            **record,
            "clients": [{"client": EVIL, "rank": 4}],
            "client_held_out": [{"client": EVIL, "loss": 1.0}],
            "module_noise": {EVIL: 0.1, '"><img src=x>': 0.2},
            "failures": [{"client": EVIL, "reason": EVIL}],
        }
        for record in runs[0].rounds
    ]
    evil = replace(runs[0], name=EVIL, rounds=records, config={EVIL: EVIL}, versions={EVIL: EVIL})
    refused = replace(runs[1], name='"><img src=x onerror=y>', rounds=[], failure=EVIL)
    path = write_report(tmp_path, [runs[1], evil, refused])
    page = Page(path)
    assert page.source.count("<script") == 1
    assert "<img" not in page.source
    assert 'alert("x")' in page.text
    assert all(re.fullmatch(r"[\w.-]+", name) for name in page.ids)


def test_a_gap_below_the_spread_over_seeds_is_no_difference(tmp_path: Path) -> None:
    run = make_runs(tmp_path, ["flora"], seeds=1, state=False)[0]

    def ends(name: str, *losses: float) -> list[Run]:
        return [
            replace(run, name=name, seed=seed, rounds=[{"round": 1, "held_out_loss": loss}])
            for seed, loss in enumerate(losses)
        ]

    def words(*groups: list[Run]) -> str:
        runs = [each for group in groups for each in group]
        return " ".join(verdict(summary_rows(runs), line_up(runs)))

    near = words(ends("flora", 1.0, 1.2), ends("rbla", 1.1, 1.3), ends("ideal", 2.0, 2.1))
    assert "FLoRA ends with the lowest held-out loss, 1.1000 ± 0.1414" in near
    assert "cannot be told apart from RBLA" in near
    assert "first that can, Dense mean (reference), is 0.9500 behind" in near
    far = words(ends("flora", 1.0, 1.02), ends("rbla", 1.1, 1.12))
    assert "cannot be told apart" not in far
    assert "The next, RBLA, is 0.1000 behind, 7.1 times" in far
    assert "one seed says little" in words(ends("flora", 1.0), ends("rbla", 1.1))
    partial = [*ends("flora", 1.0), replace(run, seed=7, rounds=[], failure="disk full")]
    assert "FLoRA (seed 7) has no result: disk full." in words(partial, ends("rbla", 1.1))


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_a_browser_runs_the_page_without_an_error(
    compared: tuple[Path, list[Run]], tmp_path: Path
) -> None:
    clicked = tmp_path / "clicked.html"
    click = "<script>document.querySelectorAll('.chip')[1].click()</script></body>"
    clicked.write_text(compared[0].read_text().replace("</body>", click))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", clicked.as_uri()]
    done = subprocess.run(
        [str(BROWSER), *options], capture_output=True, text=True, timeout=60, check=True
    )
    assert "CONSOLE" not in done.stderr
    assert 'class="js picking"' in done.stdout
    assert 'class="picked"' in done.stdout
    assert 'aria-pressed="true"' in done.stdout
