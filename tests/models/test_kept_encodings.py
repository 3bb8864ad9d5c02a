"""Encoded copies live as long as the examples that they are of: one seed's do not outlive it."""

import gc
import json
from pathlib import Path

import pytest

from models.tuned_model import TunedModel
from tasks.encoding import Encoding
from tasks.examples import Example, Examples
from tasks.partition import federate, global_held_out, own_part
from tools.rehearsal.tiny_models import open_model, settings_for


@pytest.fixture
def tuned(llama_folder: Path) -> TunedModel:
    return open_model(llama_folder)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{k}", "response": "b"}) for k in range(40)))
    return path


def living() -> int:
    gc.collect()
    return sum(type(each) is Encoding for each in gc.get_objects())


def test_a_comparison_of_many_seeds_keeps_the_encodings_of_few(
    tuned: TunedModel, rows: Path
) -> None:
    data = settings_for(Path("unused"), data__path=str(rows), data__partition="iid").data
    for reading in (federate, global_held_out, own_part):
        reading.cache_clear()  # what other tests read, and would let go of meanwhile
    before, most = living(), 0
    for seed in range(8):
        federation = federate(data, 3, seed)
        for part in federation.parts:
            tuned.encode(part.train, data)
            tuned.encode(part.held_out, data)
        tuned.encode(global_held_out(data, 3, seed, 0), data)
        del part, federation
        most = max(most, living() - before)
    of_one_seed = 3 * 2 + 1
    assert of_one_seed <= most <= 2 * of_one_seed  # `federate` itself keeps the last two


def test_what_a_run_holds_is_encoded_once(tuned: TunedModel, rows: Path) -> None:
    data = settings_for(Path("unused"), data__path=str(rows), data__partition="iid").data
    federation, own = federate(data, 3, 0), own_part(data, str(rows), 0)
    held = [
        *(examples for part in federation.parts for examples in (part.train, part.held_out)),
        *(own.train, own.held_out, global_held_out(data, 3, 0, 0)),
    ]
    for examples in held:
        assert tuned.encode(examples, data) is tuned.encode(examples, data)


def test_examples_that_come_later_are_never_taken_for_those_that_went(tuned: TunedModel) -> None:
    data = settings_for(Path("unused"), data__path="mine.jsonl").data
    for count in range(1, 30):  # a list that went leaves its place, and its id, to the next
        examples = Examples(Example(f"{count}", "b", "") for _ in range(count))
        assert len(tuned.encode(examples, data).examples) == count
        del examples
