"""What the owner of a site can do to Flower in the site's own environment, to harm a run.

`environment` of a site goes in front of its start script. The ClientApp's process is then another
than the project's: what it pushes is changed on the way out, after the app has answered honestly.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    add_header_to_object_body,
    get_object_body,
)

HOSTILE = "BOUQUET_HOSTILE"
"""Environment variable: which of PLANS this site follows."""


def break_records(content: RecordDict) -> None:
    """Every record has the right header and a body that is no protobuf."""
    for record in content.values():
        if isinstance(record, ConfigRecord):
            _pushed_as(record, b"\xff" * 40)


def flood_strings(content: RecordDict) -> None:
    """300,000 strings where a few words are expected."""
    content["failure"] = ConfigRecord({"reason": "no", "words": ["x" * 20] * 300_000})


def flood_records(content: RecordDict) -> None:
    """Hundreds of records that nobody asked for."""
    for number in range(300):
        content[f"unasked-{number}"] = ConfigRecord({"text": f"{number}"})


def claim_another_name(content: RecordDict) -> None:
    """The site says that it is oslo."""
    content.config_records["site"]["client"] = "oslo"


def repeat_a_chunk(content: RecordDict) -> None:
    """The adapter's array says that its one chunk comes two million times over."""
    record = content.array_records["adapter"]
    for array in record.values():
        assert isinstance(array, Array)
        told = json.loads(get_object_body(array.deflate(), Array))
        told["arraychunk_ids"] = [0] * 2_000_000
        _pushed_as(array, json.dumps(told).encode())


def cut_small(content: RecordDict) -> None:
    """The adapter comes in chunks of 64 bytes: thousands of questions to the SuperLink."""
    from flwr.app.message import array

    array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE = 64
    for each in content.array_records["adapter"].values():
        vars(each).pop("_chunks", None)


def hold_back(content: RecordDict) -> None:
    """The answer is announced, and the bytes of its adapter never come."""
    from flwr.supernode.runtime import run_clientapp

    push = run_clientapp.push_objects

    def push_others(objects: dict[str, InflatableObject], *more: Any, **keys: Any) -> None:
        kept = {name: each for name, each in objects.items() if not isinstance(each, ArrayChunk)}
        push(kept, *more, **keys)

    run_clientapp.push_objects = push_others  # type: ignore[assignment]


def _pushed_as(found: InflatableObject, body: bytes) -> None:
    """This object goes out with its own header and this body."""
    content = add_header_to_object_body(object_body=body, obj=found)
    vars(found)["deflate"] = lambda: content


Mischief = Callable[[RecordDict], None]
PLANS: dict[str, dict[str, tuple[Mischief, ...]]] = {
    "at-query": {"query": (break_records,)},
    "at-train": {
        "train": (
            break_records,
            flood_strings,
            flood_records,
            repeat_a_chunk,
            cut_small,
            hold_back,  # the last: its SuperNode waits for these bytes, too
        )
    },
    "as-oslo": {"query": (claim_another_name,)},
    "at-evaluate": {"evaluate": (break_records, flood_strings, flood_records, break_records)},
}
"""Site -> kind of message -> what it does in round 1, 2, ...: all of them honest but for this."""
SITES = tuple(PLANS)


def environment(plan: str) -> str:
    """In front of a site's start script: `env` with what makes its Python load this."""
    root = Path(__file__).resolve().parents[2]
    return f"env {HOSTILE}={plan} PYTHONPATH={Path(__file__).parent / 'hostile_site'}:{root}"


def infect() -> None:
    """Change how this process pushes its answer."""
    from flwr.supernode.runtime import run_clientapp

    push = run_clientapp.push_message
    plan = PLANS[os.environ[HOSTILE]]

    def push_changed(client: object, message: Message, context: object) -> None:
        mischief = plan.get(message.metadata.message_type.partition(".")[0], ())
        if mischief and message.has_content():
            reply = message.content.config_records.get("reply")
            number = int(str(reply["round"])) if reply else 1
            chosen = mischief[(number - 1) % len(mischief)]
            chosen(message.content)
            print(f"hostile: {chosen.__name__} in round {number}", flush=True)
        push(client, message, context)  # type: ignore[arg-type]

    run_clientapp.push_message = push_changed  # type: ignore[assignment]
