"""Who holds which example: a global held-out part, and one part for each client."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from core.errors import UsageError, listing
from settings.run import DataSettings
from settings.site import client_name
from tasks.examples import (
    Content,
    Example,
    Examples,
    Reading,
    Source,
    States,
    choose,
    file_states,
    fingerprint_of,
    read_data,
)
from tasks.reasons import EMPTY, IDENTICAL, NULL, TEST_SEEN, Counts

DRAWS = 1000


@dataclass(frozen=True)
class Part:
    """One client's examples: what it trains on, and what it keeps for evaluation."""

    train: Examples
    held_out: Examples
    fingerprint: str = ""
    """Hash of what was read for it, the chat template in data.chat-template-file among it."""
    counts: Counts = field(default_factory=dict)
    """Rows by what became of them; of a simulated client they are the federation's."""
    test_counts: Counts = field(default_factory=dict)
    """The same of the rows of a test set of its own."""
    template: str = ""
    """Hash of the chat template in data.chat-template-file; empty where none is named."""


@dataclass(frozen=True)
class Federation:
    """All the data of a simulation: the clients' parts, and what no client ever sees."""

    parts: list[Part]
    held_out: Examples
    sources: tuple[Source, ...] = ()
    tests: tuple[Source, ...] = ()
    """What data.evaluation names."""
    counts: Counts = field(default_factory=dict)
    """Rows by what became of them: null, empty, identical."""
    test_counts: Counts = field(default_factory=dict)
    """The same of the test set's rows, and test-seen."""
    found: tuple[str, ...] = ()
    """In which fields the examples were found, where no key names them."""
    unused: int = 0
    """Examples held out of data.path beside a test set of its own: nobody evaluates on them."""
    states: States = ()
    """The files as they were."""


def federate_anew(data: DataSettings, clients: int, seed: int, task: str = "causal") -> Federation:
    """The federation of the files as they are now, from where on `federate` gives the same.

    A run keeps the data that it began with, whatever happens to the files meanwhile; the next run
    of the same process begins with this.
    """
    now = file_states(data.path) + _test_states(data)
    federation = federate(data, clients, seed, task)
    if federation.states == now:
        return federation
    federate.cache_clear()
    global_held_out.cache_clear()
    return federate(data, clients, seed, task)


def _test_states(data: DataSettings) -> States:
    return file_states(data.evaluation, "data.evaluation") if data.evaluation else ()


@lru_cache(maxsize=2)
def federate(data: DataSettings, clients: int, seed: int, task: str = "causal") -> Federation:
    """Read, hold out, and deal to the clients. The same arguments give the same federation.

    Raises UsageError that names the clients which would be left without an example to train on.
    """
    reading = read_data(data, task=task, limit=data.max_examples, seed=seed)
    rest, held_out = _hold_out_globally(reading.examples, data, clients, seed)
    owner = DEALERS[data.partition](rest, clients, data, np.random.default_rng([seed, 2]))
    dealt: list[list[Example]] = [[] for _ in range(clients)]
    for example, client in zip(rest, owner, strict=True):
        dealt[client].append(example)
    unused = 0
    counts = Counter(reading.counts) + _copies(reading.examples)
    test_counts: Counts = {}
    tests: tuple[Source, ...] = ()
    states = reading.states
    if data.evaluation:
        test = read_test_set(data, data.evaluation, task)
        unused, held_out, tests = len(held_out), Examples(test.examples), test.sources
        states += test.states
        test_counts = _of_tests(test, reading)
    template = template_sources(data.chat_template_file)
    read = fingerprint_of([*reading.sources, *tests, *template])
    share = data.client_held_out_share()
    known = fingerprint_of(template) if template else ""
    parts = [Part(*hold_out(part, share, seed), read, counts, template=known) for part in dealt]
    if empty := [client_name(k) for k, part in enumerate(parts) if not part.train]:
        raise UsageError(
            f"{len(empty)} of {clients} clients have no examples to train on: {listing(empty)}. "
            f"{len(rest)} examples are dealt by data.partition={data.partition}"
            + (f", {len(held_out)} are held out by data.held-out" if not tests else "")
            + ": take fewer clients, more data, a larger data.dirichlet-alpha, or "
            "data.partition=iid."
        )
    return Federation(
        parts,
        held_out,
        reading.sources,
        tests,
        counts,
        test_counts,
        reading.found,
        unused,
        states,
    )


def read_test_set(
    data: DataSettings, path: str, task: str, key: str = "data.evaluation"
) -> Reading:
    """All examples of a test set, in the same fields; nothing is dealt or drawn of it."""
    return read_data(replace(data, partition="iid"), path, task, key=key)


def template_sources(file: str) -> tuple[Source, ...]:
    """The chat template in this file, as one of the files that a run reads; () without a name.

    Raises UsageError where it cannot be read.
    """
    if not file:
        return ()
    try:
        content = Path(file).expanduser().read_bytes()
    except OSError as error:
        raise UsageError(
            f"data.chat-template-file names {file}, which cannot be read: {error.strerror}"
        ) from error
    return (Source(file, len(content.splitlines()), hashlib.sha256(content).hexdigest()),)


def _copies(examples: Sequence[Example]) -> Counter[str]:
    return Counter({IDENTICAL: len(examples) - len({example.content for example in examples})})


def _of_tests(test: Reading, train: Reading) -> Counter[str]:
    """What became of a test set's rows, and how many of them have a copy in the training data."""
    known = {example.content for example in train.examples}
    seen = Counter({TEST_SEEN: sum(example.content in known for example in test.examples)})
    return Counter(test.counts) + _copies(test.examples) + seen


@lru_cache(maxsize=2)
def global_held_out(
    data: DataSettings, clients: int, seed: int, limit: int, task: str = "causal"
) -> Examples:
    """At most `limit` (0: all) of the examples that no client trains on, or of data.evaluation."""
    held_out = federate(data, clients, seed, task).held_out
    if not held_out:
        why = _why_none(federate(data, clients, seed, task), data)
        raise UsageError(
            f"no example is held out for the global model: {why}, name a test set with "
            "data.evaluation, or set evaluate.server=false"
        )
    return Examples(choose(held_out, limit, seed))


def _why_none(federation: Federation, data: DataSettings) -> str:
    """Why nothing is held out, and what would help."""
    examples = [e for part in federation.parts for e in (*part.train, *part.held_out)]
    if data.held_out_share() == 0.0:
        return "data.held-out is 0. Raise it"
    if len(examples) == 1:
        return "there is only one example. Bring more data"
    if len({example.content for example in examples}) == 1:
        lost = "".join(
            f", {federation.counts[reason]:,} more are {reason}"
            for reason in (NULL, EMPTY)
            if federation.counts.get(reason)
        )
        return f"all {len(examples):,} examples are the same one{lost}. Bring more data"
    return "each file or group has a single one, which stays with its client. Bring more data"


@lru_cache(maxsize=2)
def own_part(
    data: DataSettings,
    path: str,
    seed: int,
    task: str = "causal",
    evaluation: str | None = None,
) -> Part:
    """A site's own data, of which it holds out its share; nothing is dealt.

    So the field that a partition goes by need not be there.
    evaluation: the site's own test set, which is then what it evaluates on.
    """
    plain = replace(data, partition="iid", evaluation="")
    reading = read_data(plain, path, task, data.max_examples, seed, key="data-path")
    share = data.client_held_out_share(own_evaluation=bool(evaluation))
    train, held_out = hold_out(reading.examples, share, seed)
    counts = Counter(reading.counts) + _copies(reading.examples)
    test_counts: Counts = {}
    sources = [*reading.sources]
    if evaluation:
        test = read_test_set(plain, evaluation, task, key="evaluation-path")
        held_out = Examples(test.examples)
        sources += test.sources
        test_counts = _of_tests(test, reading)
    template = template_sources(data.chat_template_file)
    return Part(
        train,
        held_out,
        fingerprint_of([*sources, *template]),
        counts,
        test_counts,
        fingerprint_of(template) if template else "",
    )


def _hold_out_globally(
    examples: Sequence[Example], data: DataSettings, clients: int, seed: int
) -> tuple[Examples, Examples]:
    """What the clients are dealt, and what none of them has; no client loses its only example."""
    share = data.held_out_share()
    if data.partition == "files":
        return hold_out(examples, share, seed, leave_groups=True)
    rest, held_out = hold_out(examples, share, seed)
    if data.partition == "natural":
        left, there = ({example.group for example in part} for part in (rest, examples))
        if len(left) < clients <= len(there):
            return hold_out(examples, share, seed, leave_groups=True)
    return rest, held_out


def hold_out(
    examples: Sequence[Example], share: float, seed: int, leave_groups: bool = False
) -> tuple[Examples, Examples]:
    """Split off a share of the distinct examples; copies of a held-out example go with it.

    At least one example is held out where share is above 0 and two distinct ones exist.
    leave_groups: of every group at least one example stays, be it the only one.
    """
    distinct = sorted({example.content for example in examples})
    count = round(share * len(distinct))
    if share > 0 and len(distinct) > 1:
        count = min(max(count, 1), len(distinct) - 1)
    order = [
        distinct[index] for index in np.random.default_rng([seed, 3]).permutation(len(distinct))
    ]
    chosen = set(_sparing_groups(examples, order, count) if leave_groups else order[:count])
    rest = [example for example in examples if example.content not in chosen]
    held = [example for example in examples if example.content in chosen]
    return Examples(rest), Examples(held)


def _sparing_groups(
    examples: Sequence[Example], order: Sequence[Content], count: int
) -> list[Content]:
    """The first `count` of these contents, without any that would be the last of its group."""
    groups: dict[Content, set[str]] = {content: set() for content in order}
    for example in examples:
        groups[example.content].add(example.group)
    left = Counter(group for content in order for group in groups[content])
    chosen: list[Content] = []
    for content in order:
        if len(chosen) < count and all(left[group] > 1 for group in groups[content]):
            chosen.append(content)
            left.subtract(groups[content])
    return chosen


def _deal_iid(
    examples: Sequence[Example], clients: int, data: DataSettings, rng: np.random.Generator
) -> list[int]:
    """Shuffled, then dealt in turn: sizes differ by at most one."""
    owner = np.arange(len(examples)) % clients
    return [int(client) for client in rng.permutation(owner)]


def _deal_dirichlet(
    examples: Sequence[Example], clients: int, data: DataSettings, rng: np.random.Generator
) -> list[int]:
    """For each label, clients' shares from Dirichlet(alpha) (Hsu et al., arXiv 1909.06335).

    Drawn again, up to DRAWS times, until every client has data.min-examples.
    """
    for _ in range(DRAWS):
        owner = [0] * len(examples)
        for label in sorted({example.group for example in examples}):
            members = [index for index, example in enumerate(examples) if example.group == label]
            shares = rng.dirichlet([data.dirichlet_alpha] * clients)
            bounds = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for client, chunk in enumerate(np.split(rng.permutation(members), bounds)):
                for index in chunk:
                    owner[int(index)] = client
        if np.bincount(owner, minlength=clients).min() >= data.min_examples:
            return owner
    raise UsageError(
        f"in {DRAWS} draws of Dirichlet({data.dirichlet_alpha:g}) some of {clients} clients "
        f"always had fewer than data.min-examples={data.min_examples} of {len(examples)} examples: "
        "take fewer clients, more data, a larger data.dirichlet-alpha, or data.partition=iid"
    )


def _deal_natural(
    examples: Sequence[Example], clients: int, data: DataSettings, rng: np.random.Generator
) -> list[int]:
    """Whole groups, the largest first, each to the client with the fewest examples so far."""
    sizes: dict[str, int] = {}
    for example in examples:
        sizes[example.group] = sizes.get(example.group, 0) + 1
    if len(sizes) < clients:
        raise UsageError(
            f"data.partition=natural deals whole groups of {data.field!r}: {len(sizes)} groups are "
            f"not enough for {clients} clients. Take fewer clients, another data.field, or "
            "data.partition=iid."
        )
    held = [0] * clients
    home: dict[str, int] = {}
    for group in sorted(sizes, key=lambda name: (-sizes[name], name)):
        home[group] = held.index(min(held))
        held[home[group]] += sizes[group]
    return [home[example.group] for example in examples]


def _deal_files(
    examples: Sequence[Example], clients: int, data: DataSettings, rng: np.random.Generator
) -> list[int]:
    """One file for each client, in the order the files were named."""
    files = list(dict.fromkeys(example.group for example in examples))
    if len(files) != clients:
        raise UsageError(
            f"data.partition=files needs one file for each of {clients} clients; data.path names "
            f"{len(files)}: {listing(files)}. Set clients.count={len(files)} (--clients)"
        )
    return [files.index(example.group) for example in examples]


DEALERS = {
    "iid": _deal_iid,
    "dirichlet": _deal_dirichlet,
    "natural": _deal_natural,
    "files": _deal_files,
}
