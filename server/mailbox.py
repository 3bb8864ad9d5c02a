"""Messages out, answers in; every wait has an end, whoever stays silent.

Flower holds an answer until somebody asks for it. A mailbox asks for every message that is still
out, so an answer that comes after its round is fetched, counted and dropped. A SuperLink that is
briefly unavailable (its database is locked, say) is retried before the run gives up.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from core.errors import quoted
from core.events import log, logfmt
from server.flower_grid import LOST, Postbox, Question

Found = TypeVar("Found")
AGAIN_AFTER_SECONDS = (1.0, 2.0, 4.0, 8.0)
TRANSPORT = "httpx"
"""The library by which Flower's grid asks the SuperLink: its errors are worth another try."""
SHORTEST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
SILENT_AT_LEAST_SECONDS = 30.0
SILENT_TIMES = 3.0
"""So many times as long as the slowest that answered, and a node is asked again."""
SILENT_ALL = 1 / 3
"""Where fewer than half have answered: after this part of the wait."""
NONCE = "nonce"
"""The record that makes each message unlike all others: no site can guess the number of one that
went to another, or name one of its parts before it is sent."""
TOO_LATE = 1 / 20
"""In this last part of a wait nobody is asked again: no answer can come in time."""


@dataclass(frozen=True)
class Look:
    """A wait that goes on, by nodes."""

    heard: Set[int]
    silent: Set[int]
    again: Set[int]
    """Of the silent, who was asked once more."""
    seconds: float
    """Since the messages went out."""
    left: float


class _Wait:
    """One exchange: who was asked, who has answered, who is silent, by nodes."""

    def __init__(
        self, letters: list[Message], seconds: float, stagger: float, room: Mapping[int, int]
    ) -> None:
        self._began = time.monotonic()
        self._seconds = seconds
        self._stagger = stagger
        self._again_after = seconds * SILENT_ALL
        self._first: set[str] = set()
        self._well = 0
        self.room = room
        self.unsent = letters
        self.silent: dict[int, Message] = {}
        self.heard: set[int] = set()
        self.again: set[int] = set()
        """Who was asked once more."""
        self.lost: set[int] = set()
        """Of whom a message was lost."""

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds until it ends; below zero when it has."""
        return self._seconds - self.elapsed

    def due(self, idle: bool) -> list[Message]:
        """The messages that go out now; idle: no answer is waited for."""
        if not self._stagger:
            return self.unsent
        steps = len(self.silent) + len(self.heard)
        return self.unsent[:1] if idle or self.elapsed >= steps * self._stagger else []

    def sent(self, letters: Sequence[Message], asked: Set[str], nodes: Set[int]) -> None:
        """These went out; `asked` are their ids, to those of the nodes that are there."""
        self.unsent = self.unsent[len(letters) :]
        self._first |= asked
        to = {letter.metadata.dst_node_id: letter for letter in letters}
        self.silent |= {node: letter for node, letter in to.items() if node in nodes}

    def is_first(self, answer: Message) -> bool:
        """Whether it answers the first question that its node was asked."""
        return answer.metadata.reply_to_message_id in self._first

    def heard_of(self, node: int, failed: bool) -> None:
        """It has answered; how long an answer takes, those who have not failed show together."""
        del self.silent[node]
        self.heard.add(node)
        self._well += not failed
        if 2 * self._well >= len(self.heard) + len(self.silent) + len(self.unsent):
            self._again_after = max(SILENT_AT_LEAST_SECONDS, SILENT_TIMES * self.elapsed)

    def may_ask_again(self, node: int) -> bool:
        """Once, and not so late that no answer can come in time."""
        return node not in self.again and self.left > TOO_LATE * self._seconds

    def silent_for_too_long(self) -> set[int]:
        """Who should be asked again, the answer being lost perhaps."""
        if self.elapsed <= self._again_after:
            return set()
        return {node for node in self.silent if self.may_ask_again(node)}

    def look(self, left: float) -> Look:
        """How it stands."""
        silent = frozenset(self.silent)
        return Look(frozenset(self.heard), silent, self.again & silent, self.elapsed, left)


class Mailbox:
    """A run's messages, and what is out of them.

    strays: how many answers came that nobody waited for: `late` (their wait was over), `duplicate`
    (the message was answered before), `foreign` (to no message of this mailbox); and how many never
    came: `lost`.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._postbox = Postbox(grid)
        self._questions: dict[str, Question] = {}
        self._waiting: set[str] = set()
        self._later: set[str] = set()
        self._overdue: set[str] = set()
        self._answered: set[str] = set()
        self._answers: list[Message] = []
        self.strays: Counter[str] = Counter()
        self.unheard: list[Message] = []
        """Answers that had come when the caller of `exchange` stopped listening."""

    @property
    def is_closed(self) -> bool:
        """Whether all nodes are there from the start, as in a simulation: nobody else can come."""
        return not self._postbox.is_networked

    def node_ids(self) -> list[int]:
        """The nodes that are connected now, sorted."""
        return sorted(_patiently(self._grid.get_node_ids))

    def exchange(
        self,
        messages: Iterable[Message],
        seconds: float,
        array_bytes: Mapping[int, int] | None = None,
        look: Callable[[Look], None] = lambda look: None,
        stagger: float = 0.0,
    ) -> Iterator[Message]:
        """Send the messages and yield each answer as it comes, until `seconds` have passed.

        array_bytes: node -> the most that the arrays of its answer can need; nothing by default.
        An answer that cannot be read comes as one with an error, of the node that sent it.
        look: called as long as somebody is silent, and at the end of the wait.
        stagger: seconds after which the next message goes out, if all that were asked are silent;
        it goes out at once when they have answered. 0: all go at once.

        A node that is silent for far longer than the others is asked once more, for its answer may
        be lost; the first of two answers counts. The caller may stop before; what comes after that
        is late, and what had come with the last one that was taken is in `unheard`.
        """
        self.unheard = []
        self._overdue |= self._waiting
        self._waiting = set()
        wait = _Wait(list(messages), seconds, stagger, array_bytes or {})
        pause = self._shortest_pause()
        while True:
            if letters := wait.due(not self._waiting):
                self._send(wait, letters)
            came = [
                answer for node, answer in self._pull_sorted() if self._takes(wait, node, answer)
            ]
            for at, answer in enumerate(came):
                self.unheard = came[at + 1 :]
                yield answer
            if wait.left <= 0.0 or not (self._waiting or wait.unsent):
                look(wait.look(0.0))
                return
            if overdue := wait.silent_for_too_long():
                self._ask_again(wait, overdue)
            look(wait.look(wait.left))
            pause = self._shortest_pause() if came else min(2.0 * pause, LONGEST_PAUSE_SECONDS)
            time.sleep(max(0.0, min(pause, wait.left)))

    def _send(self, wait: "_Wait", letters: Sequence[Message]) -> None:
        """Ask these nodes for the first time; who is gone already is not waited for."""
        asked = self._push(letters, wait.room)
        self._waiting |= asked
        wait.sent(letters, asked, {self._questions[name].node for name in asked})

    def _takes(self, wait: "_Wait", node: int, answer: Message) -> bool:
        """Whether this is the answer of a node that is still silent."""
        is_lost = _is_lost(answer)
        if is_lost:
            self._count_lost(wait, node)
        if node not in wait.silent:
            if not is_lost:
                self.strays["duplicate"] += 1
            return False
        if is_lost and node in self._out():
            return False  # its other question may still be answered
        if is_lost and wait.may_ask_again(node):
            self._ask_again(wait, {node})
            return False
        if not wait.is_first(answer):
            self._count_lost(wait, node)
        wait.heard_of(node, answer.has_error() or "failure" in answer.content)
        self._drop_questions(node)
        return True

    def _count_lost(self, wait: "_Wait", node: int) -> None:
        if node not in wait.lost:
            wait.lost.add(node)
            self.strays["lost"] += 1

    def _ask_again(self, wait: "_Wait", nodes: Set[int]) -> None:
        """The same messages once more, to live as long as they are waited for."""
        log.warning(logfmt("asked-again", nodes=",".join(map(str, sorted(nodes)))))
        letters = [_copy(wait.silent[node], wait.left) for node in sorted(nodes)]
        self._waiting |= self._push(letters, wait.room)
        wait.again |= nodes

    def _out(self) -> set[int]:
        """The nodes whose answers are waited for."""
        return {self._questions[name].node for name in self._waiting}

    def _drop_questions(self, node: int) -> None:
        """Wait no more for other answers of this node."""
        rest = {name for name in self._waiting if self._questions[name].node == node}
        self._waiting -= rest
        self._overdue |= rest

    def ask_later(self, messages: Iterable[Message]) -> None:
        """Send messages whose answers `answers` will hand out whenever they have come."""
        self._later |= self._push(messages, {})

    def answers(self) -> list[Message]:
        """What has come for `ask_later` since the last call; waits for nothing."""
        self._overdue |= self._waiting
        self._waiting = set()
        self._pull()
        came, self._answers = self._answers, []
        return came

    def _shortest_pause(self) -> float:
        """The more are out, the longer: to look is a write to the SuperLink's database."""
        return min(SHORTEST_PAUSE_SECONDS * max(1, len(self._waiting)), LONGEST_PAUSE_SECONDS)

    def _push(self, messages: Iterable[Message], array_bytes: Mapping[int, int]) -> set[str]:
        letters = [_sealed(letter) for letter in messages]
        names = list(_patiently(lambda: self._postbox.push(letters, self._questions)))
        asked = {name: letter.metadata for name, letter in zip(names, letters, strict=True) if name}
        self._questions |= {
            name: Question(to.dst_node_id, to.message_type, array_bytes.get(to.dst_node_id, 0))
            for name, to in asked.items()
        }
        return set(asked)

    def _pull_sorted(self) -> list[tuple[int, Message]]:
        """What has come, answers before losses: of two questions one may be lost, one answered."""
        return sorted(self._pull(), key=lambda pulled: _is_lost(pulled[1]))

    def _pull(self) -> list[tuple[int, Message]]:
        """The answers that `exchange` waits for, with the nodes that were asked.

        All others are put where they belong.
        """
        came = []
        for answer in _patiently(
            lambda: self._postbox.pull(self._questions, self._waiting | self._later)
        ):
            question = answer.metadata.reply_to_message_id
            asked = self._questions.pop(question, None)
            if asked is not None and question in self._waiting:
                came.append((asked.node, answer))
            elif question in self._later:
                self._answers.append(answer)
            else:
                self.strays[self._kind_of_stray(question)] += 1
            for names in (self._waiting, self._later, self._overdue):
                names.discard(question)
            self._answered.add(question)
        return came

    def _kind_of_stray(self, question: str) -> str:
        if question in self._answered:
            return "duplicate"
        return "late" if question in self._overdue else "foreign"


def _is_lost(answer: Message) -> bool:
    """Whether the SuperLink says that the message, or its answer, is gone."""
    return answer.has_error() and answer.error.code in LOST


def _sealed(letter: Message) -> Message:
    """The same message, with a number in it that nobody can guess."""
    nonce = ConfigRecord({NONCE: secrets.token_hex(16)})
    content = RecordDict({**letter.content, NONCE: nonce})
    return _with(letter, content, letter.metadata.ttl)


def _copy(letter: Message, seconds: float) -> Message:
    return _with(letter, letter.content, seconds)


def _with(letter: Message, content: RecordDict, seconds: float) -> Message:
    told = letter.metadata
    return Message(
        content,
        dst_node_id=told.dst_node_id,
        message_type=told.message_type,
        group_id=told.group_id,
        ttl=seconds,
    )


def _patiently(ask: Callable[[], Found]) -> Found:
    """The SuperLink's answer; asked up to five times where the way to it, or it, fails."""
    for pause in AGAIN_AFTER_SECONDS:
        try:
            return ask()
        except Exception as error:
            if not type(error).__module__.startswith(TRANSPORT):
                raise
            log.warning(logfmt("superlink-failed", again_in=pause, reason=quoted(error, 200)))
            time.sleep(pause)
    return ask()
