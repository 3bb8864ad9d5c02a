"""One answer is one site's answer, whatever it is made of.

Flower's own client and protobuf messages, by HTTP to what plays the SuperLink; the answers are
Flower's own objects, with some of their bytes exchanged as the owner of a SuperNode could.
"""

import json
import tracemalloc
from collections.abc import Callable, Iterator, Set
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectResponse,
)
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid.http_grid import HttpGrid

from server.flower_grid import TEXT_BYTES, Postbox, Question
from simulations.grid import InProcessGrid
from tests.fake_clients import fake_app
from wire.records import from_record, to_record

MB = 1 << 20
CHUNK = 5 * MB
PACKED = bytes(range(256)) * 3
ONE_BYTE = Array("uint8", (1,), "bouquet.adapter", b"x")
GOOD_BYTES = b"good" * 100
GOOD, BAD = 11, 22
"""Nodes."""


class Respond(BaseHTTPRequestHandler):
    """Hands each request to the SuperLink, or breaks the connection."""

    server: "SuperLink"

    def do_POST(self) -> None:
        request = self.rfile.read(int(self.headers["content-length"]))
        if self.path.endswith("/pull-object") and self.server.broken_wire:
            self.server.broken_wire -= 1
            self.close_connection = True
            return
        response = self.server.respond(self.path, request)
        self.send_response(200 if response is not None else 500)
        response = response or b""
        self.send_header("content-length", str(len(response)))
        self.end_headers()
        self.wfile.write(response)

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Say nothing."""


class SuperLink(ThreadingHTTPServer):
    """What a ServerApp asks of a SuperLink, from a dictionary, by HTTP."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Respond)
        InProcessGrid(fake_app(), 1, {})  # gives this process the identity that messages need
        self.objects: dict[str, bytes | None] = {}
        self.answers: dict[str, tuple[Any, Any]] = {}
        self.received: list[str] = []
        self.fetched: list[str] = []
        """The kind of each object that was asked for."""
        self.broken_wire = 0
        self.unspeakable: set[str] = set()
        """Questions to which there is an answer that the SuperLink itself cannot read."""
        self.known_trees: dict[str, set[str]] = {}
        """Of each object that was announced: its parts."""
        grid = HttpGrid(insecure=True, token="t")
        grid.set_run(Run.create_empty(1))
        grid._client = RuntimeHttpClient("http://{}:{}".format(*self.server_address))
        self.postbox = Postbox(grid)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client hung up, as it does on what is too large."""

    def respond(self, path: str, request: bytes) -> bytes | None:
        """None where it fails, as with status 500."""
        if path.endswith("/push-messages"):
            return self.store(PushAppMessagesRequest.FromString(request))
        if path.endswith("/pull-messages"):
            asked = set(PullAppMessagesRequest.FromString(request).message_ids)
            if asked & self.unspeakable:
                return None
            here = [self.answers.pop(name) for name in list(self.answers) if name in asked]
            return PullAppMessagesResponse(
                messages_list=[message for message, _ in here],
                message_object_trees=[tree for _, tree in here],
            ).SerializeToString()
        if path.endswith("/pull-object"):
            wanted = PullObjectRequest.FromString(request).object_id
            content = self.objects.get(wanted)
            self.fetched.append((content or b"?").partition(b" ")[0].decode())
            return PullObjectResponse(
                object_found=wanted in self.objects,
                object_available=content is not None,
                object_content=content or b"",
            ).SerializeToString()
        if path.endswith("/push-object"):
            return PushObjectResponse(stored=True).SerializeToString()
        self.received.append(path)
        self.known_trees = {}  # those of the one message with which a test is about
        return b""

    def store(self, request: PushAppMessagesRequest) -> bytes | None:
        """As Flower's store: an object that is known must have the parts that it has."""
        for tree in request.message_object_trees:
            for each in iterate_object_tree(tree):
                parts = {child.object_id for child in each.children}
                if self.known_trees.get(each.object_id, parts) != parts:
                    return None
        ids = [message.metadata.message_id for message in request.messages_list]
        return PushAppMessagesResponse(message_ids=ids).SerializeToString()

    def push(
        self,
        question: str,
        node: int,
        content: RecordDict | Error,
        spoil: Callable[[dict[str, bytes]], None] = lambda objects: None,
    ) -> dict[str, bytes]:
        """The answer of a node; its objects pass through `spoil` before they are stored."""
        asked = Message(RecordDict(), dst_node_id=node, message_type="train")
        asked.metadata.__dict__["_message_id"] = question
        answer: Any = Message(content, reply_to=asked)
        answer.metadata.__dict__["_message_id"] = answer.object_id
        objects = {name: each.deflate() for name, each in get_all_nested_objects(answer).items()}
        spoil(objects)
        self.objects |= objects
        self.answers[question] = (
            message_to_proto(remove_content_from_message(answer)),
            get_object_tree(answer),
        )
        return objects

    def pull(self, awaited: Set[str] | None = None, **array_bytes: int) -> dict[str, Message]:
        """What the answers to these questions became: `good` of node GOOD, others of BAD."""
        asked = {
            name: Question(GOOD if name == "good" else BAD, "train", size)
            for name, size in array_bytes.items()
        }
        came = self.postbox.pull(asked, asked.keys() if awaited is None else awaited)
        return {answer.metadata.reply_to_message_id: answer for answer in came}


@pytest.fixture
def link() -> Iterator[SuperLink]:
    with SuperLink() as link:
        thread = Thread(target=link.serve_forever, args=(0.01,))
        thread.start()
        yield link
        link.shutdown()
        thread.join()


def reply(packed: bytes = PACKED, **records: Any) -> RecordDict:
    return RecordDict(
        {
            "adapter": to_record(packed),
            "reply": ConfigRecord({"round": 1, "base": "b"}),
            "metrics": MetricRecord({"loss": 1.0}),
            **records,
        }
    )


def exchanged(kind: str, old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    """The bytes `old` in every object of this kind become `new`, under the same name."""

    def spoil(objects: dict[str, bytes]) -> None:
        for name, content in objects.items():
            if content.startswith(kind.encode()):
                objects[name] = content.replace(old, new)

    return spoil


def with_body(kind: str, body: bytes) -> Callable[[dict[str, bytes]], None]:
    def spoil(objects: dict[str, bytes]) -> None:
        for name, content in objects.items():
            if content.startswith(kind.encode()):
                objects[name] = content[: content.index(b"\0") + 1] + body

    return spoil


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def many_times(times: int) -> Callable[[dict[str, bytes]], None]:
    """The one chunk of an array is named so many times."""

    def spoil(objects: dict[str, bytes]) -> None:
        for name, content in objects.items():
            if content.startswith(b"Array "):
                head, _, body = content.partition(b"\0")
                told = json.loads(body) | {"arraychunk_ids": [0] * times}
                objects[name] = head + b"\0" + json.dumps(told).encode()

    return spoil


def honest() -> RecordDict:
    """Another answer, that shares no object with the one that is spoiled."""
    return reply(
        GOOD_BYTES,
        reply=ConfigRecord({"round": 2, "base": "b"}),
        metrics=MetricRecord({"loss": 2.0}),
    )


BROKEN: dict[str, tuple[RecordDict | Error, Callable[[dict[str, bytes]], None]]] = {
    "metrics that are no protobuf": (reply(), with_body("MetricRecord", b"\xff\xff\xff")),
    "a config that is no protobuf": (reply(), with_body("ConfigRecord", b"\x0a\xff\x01")),
    "a message that is no protobuf": (reply(), with_body("Message", b"\xff\xff")),
    "a class that Flower does not know": (reply(), exchanged("ConfigRecord", b"Config", b"Evil")),
    "a record that is a chunk": (
        reply(),
        exchanged("MetricRecord", b"MetricRecord", b"ArrayChunk"),
    ),
    "names that are no JSON": (reply(), with_body("RecordDict", b"{")),
    "names that are a list": (reply(), with_body("RecordDict", b"[1]")),
    "names that are nested": (reply(), with_body("RecordDict", nested(100_000))),
    "names of parts that it has not": (reply(), with_body("RecordDict", b'{"reply": "00"}')),
    "an array that is no JSON": (reply(), with_body("Array ", b"{")),
    "an array without its kind": (reply(), with_body("Array ", b'{"arraychunk_ids": []}')),
    "chunks that are not there": (reply(), exchanged("Array ", b"[0]", b"[7]")),
    "chunks that are words": (reply(), exchanged("Array ", b"[0]", b'["x"]')),
    "a chunk ten thousand times": (reply(), many_times(10_000)),
    "a chunk twice": (reply(bytes(900)), many_times(2)),
    "no head at all": (reply(), lambda objects: objects.update(dict.fromkeys(objects, b"junk"))),
    "nothing at all": (reply(), lambda objects: objects.update(dict.fromkeys(objects, b""))),
    "an object that was never pushed": (reply(), lambda objects: objects.clear()),
    "a record that nobody asked for": (reply(extra=ConfigRecord({"x": 1})), lambda objects: None),
    "an array beside the adapter": (
        reply(
            adapter=ArrayRecord(
                {"packed": Array("uint8", (1,), "s", b"x"), "more": Array("uint8", (1,), "s", b"y")}
            )
        ),
        lambda objects: None,
    ),
    "an adapter larger than can be": (reply(bytes(MB)), lambda objects: None),
    "300,000 strings": (
        reply(reply=ConfigRecord({"words": [str(i) for i in range(300_000)]})),
        lambda objects: None,
    ),
    "20,000 metrics of long names": (
        reply(metrics=MetricRecord({f"metric-{i:060}": 1.0 for i in range(20_000)})),
        lambda objects: None,
    ),
    "20 MB of reason": (Error(1, "because " * (20 * MB // 8)), lambda objects: None),
    "20 MB of failure": (
        RecordDict({"failure": ConfigRecord({"reason": "no " * (20 * MB // 3)})}),
        lambda objects: None,
    ),
}


def test_an_answer_comes_as_it_was_sent(link: SuperLink) -> None:
    link.push("good", GOOD, honest())
    answer = link.pull(good=1000)["good"]
    assert answer.metadata.src_node_id == GOOD
    assert from_record(answer.content["adapter"]) == GOOD_BYTES
    assert answer.content["reply"] == ConfigRecord({"round": 2, "base": "b"})
    assert answer.content["metrics"] == MetricRecord({"loss": 2.0})
    assert len(link.received) == 1
    assert link.pull(good=1000) == {}


def test_an_error_comes_with_its_words(link: SuperLink) -> None:
    link.push("bad", BAD, Error(7, "no memory"))
    assert link.pull(bad=1000)["bad"].error.reason == "no memory"


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_a_broken_answer_is_its_site_s_alone(case: str, first: bool, link: SuperLink) -> None:
    content, spoil = BROKEN[case]
    if first:
        link.push("bad", BAD, content, spoil)
    link.push("good", GOOD, honest())
    if not first:
        link.push("bad", BAD, content, spoil)
    came = link.pull(good=1000, bad=1000)
    assert from_record(came["good"].content["adapter"]) == GOOD_BYTES
    assert came["bad"].metadata.src_node_id == BAD
    assert came["bad"].has_error()
    assert 0 < len(came["bad"].error.reason or "") <= 500
    assert link.pull(good=1000, bad=1000) == {}  # and it is not asked for again


def test_what_nobody_asked_for_is_named(link: SuperLink) -> None:
    content = reply()
    content["x\x1b[2J"] = ConfigRecord({})
    link.push("bad", BAD, content)
    reason = link.pull(bad=1000)["bad"].error.reason
    assert str(reason).startswith("it holds x\\x1b[2J, which was not asked for")


def test_nobody_answers_for_another(link: SuperLink) -> None:
    def as_good(objects: dict[str, bytes]) -> None:
        with SuperLink() as elsewhere:
            (told,) = elsewhere.push("good", GOOD, Error(1, "I give up")).values()
        (name,) = objects
        objects[name] = told

    link.push("bad", BAD, Error(1, "mine"), as_good)
    link.push("good", GOOD, honest())
    came = link.pull(good=1000, bad=1000)
    assert came["bad"].metadata.src_node_id == BAD
    assert came["good"].has_content()


def test_bytes_that_still_come_hold_up_nobody(link: SuperLink) -> None:
    objects = link.push("bad", BAD, reply())
    late = next(name for name, content in objects.items() if content.startswith(b"ArrayChunk"))
    link.objects[late] = None
    link.push("good", GOOD, honest())
    assert set(link.pull(good=1000, bad=1000)) == {"good"}
    assert link.pull(bad=1000) == {}
    link.objects[late] = objects[late]
    assert from_record(link.pull(bad=1000)["bad"].content["adapter"]) == PACKED


def test_an_answer_that_is_waited_for_no_more_is_freed(link: SuperLink) -> None:
    """Else each round would keep what a site half pushed in it."""
    bad = reply(bytes(3 * CHUNK))
    objects = link.push("bad", BAD, bad)
    last = [name for name, content in objects.items() if content.startswith(b"ArrayChunk")][-1]
    link.objects[last] = None
    assert link.pull(bad=3 * CHUNK) == {}
    fetched = len(link.fetched)
    tracemalloc.start()
    try:
        came = link.pull(awaited=set(), bad=3 * CHUNK)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert came["bad"].error.reason == "it came after its wait was over"
    assert (len(link.fetched), len(link.received)) == (fetched, 1)
    assert kept < CHUNK
    assert link.pull(bad=3 * CHUNK) == {}


def test_of_an_answer_that_comes_too_late_nothing_is_fetched(link: SuperLink) -> None:
    link.push("bad", BAD, reply())
    assert link.pull(awaited=set(), bad=1000)["bad"].has_error()
    assert link.fetched == []
    assert len(link.received) == 1


def test_of_each_node_no_more_is_held_than_one_answer_takes(link: SuperLink) -> None:
    for question in ("first", "second", "third"):
        halves = bytes([len(question)]) * CHUNK + question.encode() * MB
        objects = link.push(question, BAD, reply(halves))
        for name, each in objects.items():
            if each.startswith(b"ArrayChunk") and question.encode() in each[-20:]:
                link.objects[name] = None
    link.pull(good=0)  # what any pull loads
    tracemalloc.start()
    try:
        assert link.pull(first=4 * CHUNK, second=4 * CHUNK, third=4 * CHUNK) == {}
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert CHUNK < kept < 2 * CHUNK
    assert set(link.pull(awaited={"second"}, first=4 * CHUNK, second=4 * CHUNK)) == {
        "first",
        "third",
    }


def test_a_whole_answer_is_taken_though_a_newer_one_of_its_node_is_torn(link: SuperLink) -> None:
    """As where a site was asked again, and died while it pushed its second answer."""
    link.push("first", BAD, reply(bytes([1]) * CHUNK))
    objects = link.push("second", BAD, reply(bytes([2]) * CHUNK))
    (chunk,) = {name for name, each in objects.items() if each.startswith(b"ArrayChunk")}
    link.objects[chunk] = None
    assert set(link.pull(first=2 * CHUNK, second=2 * CHUNK)) == {"first"}


def test_an_answer_whose_bytes_never_come_holds_up_no_later_one_of_its_node(
    link: SuperLink,
) -> None:
    """As of a SuperNode that was killed while it pushed, and came back."""
    objects = link.push("first", BAD, reply(bytes([1]) * CHUNK))
    (chunk,) = {name for name, each in objects.items() if each.startswith(b"ArrayChunk")}
    link.objects[chunk] = None
    assert link.pull(first=2 * CHUNK, second=2 * CHUNK) == {}
    link.push("second", BAD, reply(bytes([2]) * CHUNK))
    assert set(link.pull(first=2 * CHUNK, second=2 * CHUNK)) == {"second"}
    link.objects[chunk] = objects[chunk]
    assert from_record(link.pull(first=2 * CHUNK)["first"].content["adapter"]) == bytes([1]) * CHUNK


def test_an_array_in_tiny_chunks_is_refused_before_they_are_fetched(link: SuperLink) -> None:
    def cut(objects: dict[str, bytes]) -> None:
        for name, content in list(objects.items()):
            if content.startswith(b"Array "):
                head, _, body = content.partition(b"\0")
                told = json.loads(body) | {"arraychunk_ids": [0] * 20}
                objects[name] = head + b"\0" + json.dumps(told).encode()

    link.push("bad", BAD, reply(b"x" * 100), cut)
    reason = link.pull(bad=10 * MB)["bad"].error.reason
    assert reason == "an array came in 20 chunks where 12 are enough"
    assert not any(name.startswith("ArrayChunk") for name in link.fetched)


def test_a_wire_that_breaks_loses_nothing(link: SuperLink) -> None:
    link.push("good", GOOD, honest())
    link.push("bad", BAD, Error(1, "x"))
    for _ in range(2):
        link.broken_wire = 1
        with pytest.raises(httpx.RemoteProtocolError):
            link.pull(good=1000, bad=1000)
    assert set(link.pull(good=1000, bad=1000)) == {"good", "bad"}


def test_an_array_of_many_chunks_comes_whole(link: SuperLink) -> None:
    packed = bytes(range(256)) * (3 * CHUNK // 256) + b"end"
    link.push("good", GOOD, reply(packed))
    assert from_record(link.pull(good=len(packed))["good"].content["adapter"]) == packed


@pytest.mark.parametrize("times", [1, 600])
def test_fetching_takes_what_was_declared_and_no_more(times: int, link: SuperLink) -> None:
    declared = 8 * CHUNK
    packed = bytes(declared if times == 1 else CHUNK)
    link.push("bad", BAD, reply(packed), many_times(times) if times > 1 else lambda objects: None)
    tracemalloc.start()
    try:
        came = link.pull(bad=declared)["bad"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert came.has_error() == (times > 1)
    # Beside the array: one chunk as here serialized, as the response, and as Flower's copy of it.
    assert peak <= 1.2 * declared + 3 * CHUNK + TEXT_BYTES


def test_an_announcement_that_the_superlink_cannot_read_is_its_own_site_s(
    link: SuperLink,
) -> None:
    """As where its times are NaN, which the database stores as NULL."""
    link.unspeakable = {"bad"}
    link.push("good", GOOD, honest())
    came = link.pull(bad=1000, good=1000)
    assert set(came) == {"good"}
    tries = [link.pull(bad=1000, more=1000) for _ in range(2)]
    assert tries[0] == {}
    assert "the SuperLink cannot hand out what it announced" in tries[1]["bad"].error.reason
    assert tries[1]["bad"].metadata.src_node_id == BAD


def test_a_superlink_that_fails_at_everything_is_no_site_s_bad_answer(link: SuperLink) -> None:
    link.unspeakable = {"bad", "0" * 64}
    for _ in range(5):
        with pytest.raises(httpx.HTTPStatusError):
            link.pull(bad=1000)


def test_who_announces_parts_of_the_next_message_does_not_stop_it(link: SuperLink) -> None:
    letter = Message(
        RecordDict({"start": to_record(PACKED)}), dst_node_id=GOOD, message_type="train"
    )
    link.push("bad", BAD, reply())
    link.push("good", GOOD, honest())
    _, tree = link.answers["bad"]
    poison = letter.content.object_id
    tree.children.append(ObjectTree(object_id=poison))
    link.known_trees = {poison: set()}
    asked = {"bad": Question(BAD, "train", 1000), "good": Question(GOOD, "train", 1000)}
    with pytest.raises(httpx.HTTPStatusError):
        link.postbox.push([letter], asked)
    assert list(link.postbox.push([letter], asked)) == [letter.object_id]
    came = link.pull(awaited=set(asked), bad=1000)
    assert "the coordinator's own messages" in came["bad"].error.reason
    assert came["bad"].metadata.src_node_id == BAD
    assert from_record(came["good"].content["adapter"]) == GOOD_BYTES


@pytest.mark.parametrize("code", [3, 4])
def test_no_site_can_say_that_the_superlink_has_lost_its_answer(code: int, link: SuperLink) -> None:
    link.push("bad", BAD, Error(code, "gone"))
    error = link.pull(bad=1000)["bad"].error
    assert (error.code, error.reason) == (2, "it says of itself that the SuperLink has lost it")
