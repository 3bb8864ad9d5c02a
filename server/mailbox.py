"""Messages out, answers in: whoever is silent, a wait ends.

Flower holds an answer until somebody asks for it. A mailbox asks for all that is still out, so that
an answer that comes after its round is taken from the SuperLink, counted and dropped. A SuperLink
that is out of breath (its database is locked, say) is asked again before the run gives up.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from adapters.errors import quoted
from server.flower_grid import Postbox, Question
from settings.events import log, logfmt

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
"""Where nobody has answered: after this part of the wait."""
LOST = (3, 4)
"""Flower's codes for a message, and for an answer, that the SuperLink has no more."""


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
    ) -> Iterator[Message]:
        """Send the messages and yield each answer as it comes, until `seconds` have passed.

        array_bytes: node -> the most that the arrays of its answer can need; nothing by default.
        An answer that cannot be read comes as one with an error, of the node that sent it.
        look: called as long as somebody is silent, and at the end of the wait.

        A node that is silent for far longer than the others is asked once more, for its answer may
        be lost; the first of two answers counts. The caller may stop before; what comes after that
        is late, and what had come with the last one that was taken is in `unheard`.
        """
        self.unheard = []
        began = time.monotonic()
        room = array_bytes or {}
        silent = {letter.metadata.dst_node_id: letter for letter in messages}
        heard: set[int] = set()
        again: set[int] = set()
        lost: set[int] = set()
        again_after = seconds * SILENT_ALL
        self._overdue |= self._waiting
        self._waiting = self._push(silent.values(), room)
        first = set(self._waiting)
        silent = {node: silent[node] for node in self._out()}
        pause = self._shortest_pause()
        while self._waiting:
            came = []
            for node, answer in sorted(self._pull(), key=lambda pulled: _is_lost(pulled[1])):
                if _is_lost(answer) and node not in lost:
                    lost.add(node)
                    self.strays["lost"] += 1
                if node not in silent and not _is_lost(answer):
                    self.strays["duplicate"] += 1
                elif node not in silent or (_is_lost(answer) and node in self._out()):
                    continue  # it has answered, or its other question may still be answered
                elif _is_lost(answer) and node not in again:
                    left = max(0.0, seconds - (time.monotonic() - began))
                    self._ask_again([silent[node]], room, left)
                    again.add(node)
                else:
                    came.append(answer)
                    heard.add(node)
                    silent.pop(node)
                    self._drop_questions(node)
                    if answer.metadata.reply_to_message_id not in first and node not in lost:
                        lost.add(node)
                        self.strays["lost"] += 1
            elapsed = time.monotonic() - began
            if came:
                again_after = max(SILENT_AT_LEAST_SECONDS, SILENT_TIMES * elapsed)
            for at, answer in enumerate(came):
                self.unheard = came[at + 1 :]
                yield answer
            left = seconds - (time.monotonic() - began)
            if not self._waiting or left <= 0.0:
                look(Look(frozenset(heard), frozenset(silent), again & silent.keys(), elapsed, 0.0))
                return
            if elapsed > again_after and silent.keys() - again:
                self._ask_again([silent[n] for n in silent.keys() - again], room, left)
                again |= silent.keys()
            look(Look(frozenset(heard), frozenset(silent), again & silent.keys(), elapsed, left))
            pause = self._shortest_pause() if came else min(2.0 * pause, LONGEST_PAUSE_SECONDS)
            time.sleep(min(pause, left))

    def _ask_again(
        self, letters: Sequence[Message], array_bytes: Mapping[int, int], seconds: float
    ) -> None:
        """The same messages once more, to live for so many seconds."""
        nodes = [letter.metadata.dst_node_id for letter in letters]
        log.warning(logfmt("asked-again", nodes=",".join(map(str, sorted(nodes)))))
        self._waiting |= self._push([_copy(letter, seconds) for letter in letters], array_bytes)

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
        return min(SHORTEST_PAUSE_SECONDS * len(self._waiting), LONGEST_PAUSE_SECONDS)

    def _push(self, messages: Iterable[Message], array_bytes: Mapping[int, int]) -> set[str]:
        letters = list(messages)
        names = list(_patiently(lambda: self._grid.push_messages(letters)))
        asked = {name: letter.metadata for name, letter in zip(names, letters, strict=True) if name}
        self._questions |= {
            name: Question(to.dst_node_id, to.message_type, array_bytes.get(to.dst_node_id, 0))
            for name, to in asked.items()
        }
        return set(asked)

    def _pull(self) -> list[tuple[int, Message]]:
        """The answers that `exchange` waits for, with the nodes that were asked.

        All others are put where they belong.
        """
        came = []
        for answer in _patiently(lambda: self._postbox.pull(self._questions)):
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


def _copy(letter: Message, seconds: float) -> Message:
    told = letter.metadata
    return Message(
        letter.content,
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
