"""What simulated clients hold of the global model, as the disks of separate sites would.

A client that was sent a piece in a round's training keeps it as long as the model needs it, and is
not sent it again; one that was not sampled is sent later what it lacks. Who holds what is a list of
versions for each client; the bytes lie in memory once for all. What comes with a question to
evaluate is used and not kept, so that the bytes of training do not depend on evaluation.

clients/holdings.json    {client: {version: [round it came in, round in which it went or null]}}

What a torn round brought or took is undone when a run goes on, so that it counts the same bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from core.files import write_durably
from journal.run_folder import peek_state
from settings.run import RunSettings
from wire.messages import ANSWERS, parts_in
from wire.records import PIECE, to_record

FILE = "holdings.json"


class Holdings:
    """Who holds what.

    folder: where the list is kept between two processes; None: nowhere.
    packed: the pieces of the model that the run goes on from, by version.
    done: the last round that is committed; what came or went later did not happen.
    """

    def __init__(
        self, folder: Path | None = None, packed: Mapping[str, bytes] | None = None, done: int = 0
    ) -> None:
        self._path = None if folder is None else folder / FILE
        self._records = {version: to_record(data) for version, data in (packed or {}).items()}
        self._held: dict[str, dict[str, tuple[int, int | None]]] = {}
        self._own: set[str] = set()
        self._changed = False
        if self._path is not None and self._path.is_file():
            kept: Any = json.loads(self._path.read_bytes())
            for client, versions in kept.items():
                self._held[client] = {
                    version: (came, went if went is not None and went <= done else None)
                    for version, (came, went) in versions.items()
                    if came <= done
                }

    def held(self, client: str) -> list[str]:
        """The versions that this client has now."""
        found = self._held.get(client, {})
        return sorted(version for version, (_, went) in found.items() if went is None)

    def complete(self, client: str, message: Message) -> Message:
        """The message with the pieces in it that the client has, as its disk would give them."""
        parts = parts_in(message.content)
        if client in self._own or parts is None:
            return message
        versions = parts.needed
        came = [version for version in versions if PIECE + version in message.content]
        for version in came:
            record = message.content[PIECE + version]
            assert isinstance(record, ArrayRecord)
            self._records.setdefault(version, record)
        there = set(self.held(client)) & set(versions) - set(came)
        if message.metadata.message_type == MessageType.TRAIN:
            self._keep(client, versions, came, int(message.metadata.group_id))
        own = {PIECE + version: self._records[version] for version in sorted(there)}
        return _with(message, {**message.content, **own})

    def tell(self, client: str, content: RecordDict) -> None:
        """Have a client's answer say what it holds, unless it keeps a disk of its own."""
        for name in ANSWERS:
            record = content.get(name)
            if isinstance(record, ConfigRecord):
                if "holds" in record:
                    self._own.add(client)
                else:
                    record["holds"] = self.held(client)

    def save(self) -> None:
        """Write the list where it changed, whole or not at all."""
        if self._path is None or not self._changed:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_name(f".writing-{FILE}")
        write_durably(scratch, json.dumps(self._held).encode())
        scratch.rename(self._path)
        self._changed = False

    def _keep(self, client: str, versions: list[str], came: list[str], server_round: int) -> None:
        """Put what came on the client's list; what the model no longer needs goes."""
        held = self._held.setdefault(client, {})
        self._changed = True
        for version in came:
            held[version] = (server_round, None)
        for version, (since, went) in list(held.items()):
            if went is None and version not in versions:
                held[version] = (since, server_round)
            elif went is not None and went < server_round - 1:
                del held[version]
        needed = {version for each in self._held.values() for version in each}
        for version in set(self._records) - needed - set(versions):
            del self._records[version]


def open_holdings(settings: RunSettings, folder: Path) -> Holdings:
    """What the clients of a run hold at its newest committed round; nothing where it begins.

    folder: where the list is kept.
    """
    state = peek_state(settings)
    if state is None:
        return Holdings(folder)
    packed = {piece.version: piece.packed for piece in state.pieces or ()}
    return Holdings(folder, packed, state.round)


def _with(message: Message, content: dict[str, Any]) -> Message:
    """The same message to the same node with other content; the one that was sent stays."""
    copy = Message(
        RecordDict(content),
        dst_node_id=message.metadata.dst_node_id,
        message_type=message.metadata.message_type,
        group_id=message.metadata.group_id,
        ttl=message.metadata.ttl,
    )
    copy.metadata.__dict__.update(message.metadata.__dict__)
    return copy
