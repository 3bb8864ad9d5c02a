"""How an answer leaves Flower: by itself, and weighed before it is built.

Flower's grid builds all answers of a pull at once, from whatever bytes the sites pushed. One that
cannot be decoded raises for all of them, one may name the same chunk of bytes ten thousand times,
and one whose bytes never come is waited for while the others lie there. Here the SuperLink is asked
as Flower asks it, but each answer is fetched from the top down: what it holds is compared with what
was asked for before the next object is fetched, and what is wrong with it is that site's failure.

This is the one file that knows the inside of Flower's grid. A grid without network (in process, or
Flower's simulation) hands out answers that are built already.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, cast

import httpx
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde_utils import error_from_proto, metadata_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid.http_grid import HttpGrid

from core.errors import ReplyError, listing, quoted
from wire.messages import EVALUATE_RECORDS, PRINCIPAL_RECORDS, TRAIN_RECORDS
from wire.records import KEY

ANSWERS: Mapping[str, frozenset[str]] = {
    MessageType.QUERY: PRINCIPAL_RECORDS,
    MessageType.TRAIN: TRAIN_RECORDS,
    MessageType.EVALUATE: EVALUATE_RECORDS,
}
"""The records that an answer to each kind of message may hold."""
TEXT_BYTES = 1 << 20
"""The most that all of an answer but its arrays may take: names, numbers, shapes, words."""
QUERY_TEXT_BYTES = 8 << 20
"""Of an answer to a query, which names every module: 100,000 of them take about half."""
SMALLEST_CHUNK = 1 << 20
"""Flower cuts arrays into chunks of 5 MB; each chunk is a question to the SuperLink."""
ENVELOPE_BYTES = 1 << 12
"""Around an object: its own head and the response that carries it."""
PULL_OBJECT = "/pull-object"
BROKEN = 2
"""The code of the Error that an answer becomes which cannot be read."""
LOST = (3, 4)
"""Flower's codes for a message, and for an answer, that the SuperLink has no more."""
ATTEMPTS_ALONE = 3
"""So often an announcement may fail alone while others do not."""
CONTRADICTS = "it announced parts of the coordinator's own messages as made of something else"


@dataclass(frozen=True)
class Question:
    """What a message asked of a node, and the most that the arrays of its answer may take."""

    node: int
    kind: str
    array_bytes: int = 0

    @property
    def text_bytes(self) -> int:
        """The most that all of its answer but the arrays may take."""
        return QUERY_TEXT_BYTES if self.kind == MessageType.QUERY else TEXT_BYTES

    @property
    def records(self) -> frozenset[str]:
        """The records that its answer may hold."""
        return ANSWERS.get(self.kind, frozenset())


class Postbox:
    """Fetches the answers to messages of one grid, each of them whole or not at all."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._coming: list[_Coming] = []
        self._failed_alone: Counter[str] = Counter()
        self._here: list[Message] = []
        self._gate = _Gate()

    @property
    def is_networked(self) -> bool:
        """Whether sites are elsewhere, and may come and go."""
        return isinstance(self._grid, HttpGrid)

    def pull(self, questions: Mapping[str, Question], awaited: Set[str]) -> list[Message]:
        """The answers that are here, each naming as its source the node that was asked.

        questions: by the id of the message that asked; awaited: of these, whose answers are still
        of use. Of any other nothing is fetched: it becomes a message with an Error. So does one
        that cannot be read. One whose bytes still come is handed out by a later call; of each node
        the newest alone is fetched until it is whole, so it can fill the room of one answer.
        Raises what the way to the SuperLink raises, and loses nothing by it.
        """
        if not isinstance(self._grid, HttpGrid):
            return list(self._grid.pull_messages(sorted(questions)))
        self._coming += self._announced(self._grid, questions)
        partly: dict[int, _Coming] = {}
        for coming in reversed(list(self._coming)):  # the newest first: an older one may be torn
            if coming.question_id not in awaited:
                answer: Message | None = coming.given_up()
            else:
                answer = coming.answer()
                if answer is None and coming.node in partly:
                    coming.forget()
                elif answer is None:
                    partly[coming.node] = coming
            if answer is not None:
                self._take(coming, answer)
        here, self._here = self._here, []
        return here

    def push(self, letters: list[Message], questions: Mapping[str, Question]) -> Iterable[str]:
        """Send messages; the id of each, or nothing where its node is gone.

        Objects go by their hash. A site that has announced one of them as a part of its answer,
        with other parts than it has, is in the way of all: that is found out and is its bad answer.
        """
        try:
            return self._grid.push_messages(letters)
        except httpx.HTTPStatusError as error:
            if isinstance(self._grid, HttpGrid) and _is_of_superlink(error):
                self._coming += self._announced(self._grid, questions)
                parts = _parts_of(letters)
                for coming in [each for each in self._coming if each.contradicts(parts)]:
                    self._take(coming, coming.refused(CONTRADICTS))
            raise

    def _take(self, coming: "_Coming", answer: Message) -> None:
        """It is handed out by this pull, or the next."""
        self._here.append(answer)
        self._coming.remove(coming)

    def _announced(self, grid: HttpGrid, questions: Mapping[str, Question]) -> list["_Coming"]:
        """The answers that the SuperLink has not told of before; of none is anything fetched."""
        waiting = sorted(questions.keys() - {coming.question_id for coming in self._coming})
        if not waiting:
            return []
        self._gate.guard(grid._runtime_client)
        store = _Store(grid, self._gate)
        announced = []
        for message, tree in self._told(grid, waiting, questions):
            metadata = metadata_from_proto(message.metadata)
            if question := questions.get(metadata.reply_to_message_id):
                announced.append(_Coming(store, metadata, question, tree))
        return announced

    def _told(
        self, grid: HttpGrid, waiting: list[str], questions: Mapping[str, Question]
    ) -> list[tuple[ProtoMessage, ObjectTree]]:
        """What the SuperLink has for these questions.

        One announcement with which it cannot cope fails for all that are asked for beside it, so
        each is then asked for alone; whose fails alone while others do not is that site's.
        """

        def tell(names: list[str]) -> list[tuple[ProtoMessage, ObjectTree]]:
            found = grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=names))
            return list(zip(found.messages_list, found.message_object_trees, strict=True))

        try:
            return tell(waiting)
        except httpx.HTTPStatusError as error:
            if not _is_of_superlink(error):
                raise
            tell(["0" * 64])  # a SuperLink that cannot answer even this is the one that fails
        told = []
        for name in waiting:
            try:
                told += tell([name])
                del self._failed_alone[name]
            except httpx.HTTPStatusError as error:
                self._failed_alone[name] += 1
                if self._failed_alone[name] >= ATTEMPTS_ALONE:
                    self._here.append(_unreadable(name, questions[name], quoted(error, 200)))
        return told


def _is_of_superlink(error: httpx.HTTPStatusError) -> bool:
    """Whether the SuperLink failed at what it was asked, and not the way to it."""
    return error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR


def _parts_of(letters: Iterable[Message]) -> dict[str, set[str]]:
    """Of each object of these messages, what it is made of."""
    trees = [get_object_tree(letter) for letter in letters]
    return {
        each.object_id: {child.object_id for child in each.children}
        for tree in trees
        for each in iterate_object_tree(tree)
    }


def _unreadable(question_id: str, question: Question, reason: str) -> Message:
    """The answer to a question of whose announcement the SuperLink can make nothing."""
    metadata = Metadata(0, "", question.node, 0, question_id, "", 0.0, 0.0, question.kind)
    words = quoted(f"the SuperLink cannot hand out what it announced: {reason}")
    return make_message(metadata=metadata, error=Error(BROKEN, words))


class _NotYetError(Exception):
    """An object that its site has announced and not yet pushed."""


class _Gate:
    """Stops a response that is larger than what is left for it, before its body is read."""

    def __init__(self) -> None:
        self.most = 0
        self._last: httpx.Response | None = None

    def guard(self, client: RuntimeHttpClient) -> None:
        """From now on, of all responses to this client."""
        hooks = client._client.event_hooks
        if self not in hooks["response"]:
            client._client.event_hooks = {**hooks, "response": [*hooks["response"], self]}

    def __call__(self, response: httpx.Response) -> None:
        self._last = response
        size = int(response.headers.get("content-length", 0))
        if response.request.url.path.endswith(PULL_OBJECT) and size > self.most:
            raise ReplyError(
                f"{size:,} bytes came at once where at most {self.most:,} can be needed"
            )

    def release(self) -> None:
        """Free the last body at once: httpx leaves it in a cycle until the collector comes."""
        if self._last is not None:
            vars(self._last).pop("_content", None)


class _Store:
    """The objects of a run that lie at the SuperLink."""

    def __init__(self, grid: HttpGrid, gate: _Gate) -> None:
        self._grid = grid
        self._gate = gate

    def fetch(self, object_id: str, most: int) -> bytes:
        """Take an object of at most so many bytes; _NotYetError where it is still being pushed."""
        self._gate.most = most + ENVELOPE_BYTES
        found = self._grid._runtime_client.PullObject(
            PullObjectRequest(node=self._grid.node, run_id=self._run_id, object_id=object_id)
        )
        self._gate.release()
        if not found.object_found:
            raise ReplyError("a part of it never reached the SuperLink")
        if not found.object_available:
            raise _NotYetError
        return found.object_content

    def received(self, message_id: str) -> None:
        """The SuperLink may forget the message and its objects."""
        self._grid._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._grid.node, run_id=self._run_id, message_object_id=message_id
            )
        )

    @property
    def _run_id(self) -> int:
        return self._grid.run.run_id


class _Coming:
    """One announced answer, as far as it has come."""

    def __init__(
        self, store: _Store, metadata: Metadata, question: Question, tree: ObjectTree
    ) -> None:
        self.question_id = metadata.reply_to_message_id
        self._is_of_superlink = metadata.src_node_id == SUPERLINK_NODE_ID
        self._tree = tree
        self.node = question.node
        self._store = store
        self._message_id = metadata.message_id
        metadata.__dict__["_src_node_id"] = question.node
        self._metadata = metadata
        self._question = question
        self._built: Message | None = None
        self.forget()

    def forget(self) -> None:
        """Free what has come of it; it is fetched anew when its turn comes."""
        self._objects: dict[str, bytes] = {}
        self._arrays: dict[str, tuple[bytearray, int]] = {}
        """Of each array: what has come, and the number of its chunks."""
        self._text_left = self._question.text_bytes
        self._bytes_left = self._question.array_bytes

    def answer(self) -> Message | None:
        """The answer; None as long as some of it is missing."""
        if self._built is None:
            try:
                self._built = self._build()
            except _NotYetError:
                return None
            except (httpx.HTTPError, OSError):
                raise
            except Exception as error:  # what a stranger pushed may break any decoder
                told = isinstance(error, ReplyError)
                self._built = self._broken(str(error) if told else f"cannot be read: {error!r}")
            self.forget()
        self._store.received(self._message_id)
        return self._built

    def given_up(self) -> Message:
        """What it becomes when its wait is over; what has come of it is freed, here and there."""
        return self.refused("it came after its wait was over")

    def refused(self, reason: str) -> Message:
        """What it becomes where nothing more of it is fetched."""
        self.forget()
        self._store.received(self._message_id)
        return self._broken(reason)

    def contradicts(self, parts: Mapping[str, set[str]]) -> bool:
        """Whether it was announced with an object of these that has other parts."""
        return any(
            {child.object_id for child in each.children} != parts[each.object_id]
            for each in iterate_object_tree(self._tree)
            if each.object_id in parts
        )

    def _build(self) -> Message:
        parts, body = self._text(self._message_id, Message)
        proto = ProtoMessage.FromString(body)
        if proto.HasField("error"):
            error = error_from_proto(proto.error)
            if error.code in LOST and not self._is_of_superlink:
                raise ReplyError("it says of itself that the SuperLink has lost it")
            return make_message(metadata=self._metadata, error=error)
        (content,) = parts
        names = self._names(content, RecordDict)
        if unasked := names.keys() - self._question.records:
            raise ReplyError(
                f"it holds {listing(sorted(quoted(name, 40) for name in unasked))}, which was not "
                f"asked for; expected are {listing(sorted(self._question.records))}"
            )
        records = {name: self._record(object_id) for name, object_id in names.items()}
        return make_message(metadata=self._metadata, content=RecordDict(records))

    def _broken(self, reason: str) -> Message:
        return make_message(metadata=self._metadata, error=Error(BROKEN, quoted(reason)))

    def _record(self, object_id: str) -> ArrayRecord | ConfigRecord | MetricRecord:
        self._text(object_id, ArrayRecord, ConfigRecord, MetricRecord)
        content = self._objects[object_id]
        for kind in (ConfigRecord, MetricRecord):
            if content.startswith(kind.__qualname__.encode()):
                return kind.inflate(content)
        arrays = self._names(object_id, ArrayRecord)
        if list(arrays) != [KEY]:
            raise ReplyError(
                f"expected an ArrayRecord with the one array {KEY!r}; got {len(arrays)} of them"
            )
        record = ArrayRecord()
        record[KEY] = self._array(arrays[KEY])
        return record

    def _array(self, object_id: str) -> Array:
        """The array, its chunks put in their places one by one, so that it is never held twice."""
        chunks, body = self._text(object_id, Array)
        told: Any = json.loads(body)
        order = told["arraychunk_ids"]
        most = 2 + self._question.array_bytes // SMALLEST_CHUNK
        if len(order) > most:
            raise ReplyError(f"an array came in {len(order):,} chunks where {most:,} are enough")
        data, done = self._arrays.setdefault(object_id, (bytearray(), 0))
        for at in range(done, len(order)):
            content = self._store.fetch(chunks[order[at]], self._bytes_left)
            _, chunk = _opened(content, ArrayChunk)
            if len(chunk) > self._bytes_left:
                raise ReplyError(
                    f"its arrays take more than the {self._question.array_bytes:,} bytes that can "
                    "be needed"
                )
            self._bytes_left -= len(chunk)
            data += chunk
            self._arrays[object_id] = (data, at + 1)
        array = Array(str(told["dtype"]), tuple(told["shape"]), str(told["stype"]), b"")
        array.data = cast(bytes, data)  # as Flower does it, without the copy
        return array

    def _names(self, object_id: str, kind: type[InflatableObject]) -> dict[str, str]:
        """What such an object calls its parts: name -> object."""
        parts, body = self._text(object_id, kind)
        names = json.loads(body)
        if set(names.values()) != set(parts):
            raise ReplyError(f"a {kind.__qualname__} names other parts than it has")
        return dict(names)

    def _text(self, object_id: str, *kinds: type[InflatableObject]) -> tuple[list[str], bytes]:
        """The parts and the body of an object of one of these kinds that is no array's bytes."""
        if object_id not in self._objects:
            content = self._store.fetch(object_id, self._text_left)
            self._text_left -= len(content)
            if self._text_left < 0:
                most = self._question.text_bytes
                raise ReplyError(f"beside its arrays it takes more than {most:,} bytes")
            self._objects[object_id] = content
        parts, body = _opened(self._objects[object_id], *kinds)
        return parts, bytes(body)


def _opened(content: bytes, *kinds: type[InflatableObject]) -> tuple[list[str], memoryview]:
    """The parts of an object and its body, where it is of one of these kinds."""
    end = content.index(HEAD_BODY_DIVIDER)
    kind, parts, _ = content[:end].decode().split(HEAD_VALUE_DIVIDER)
    wanted = [each.__qualname__ for each in kinds]
    if kind not in wanted:
        raise ReplyError(f"expected {' or '.join(wanted)}; got {quoted(kind, 40)}")
    return parts.split(",") if parts else [], memoryview(content)[end + 1 :]
