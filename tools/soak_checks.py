"""What a run's folder must look like whenever a server or a client was killed.

Committed rounds never change, nothing is torn, and in the end the bytes are those of a run that was
never interrupted, played by the same clients.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from journal.record import FILE, RoundRecord, read_rounds
from journal.state import load_state
from settings.keys import Value
from tools.rehearsal.loopback import Loopback


class TornError(AssertionError):
    """The run's folder is not what it must be."""


def committed(run: Path) -> tuple[int, bytes]:
    """The newest committed round (-1 before there is one) and rounds.jsonl up to it."""
    state = load_state(run / "state") if (run / "state").is_dir() else None
    if state is None:
        return -1, b""
    log = (run / "rounds.jsonl").read_bytes()[: state.log_bytes]
    if len(log) != state.log_bytes:
        raise TornError(f"rounds.jsonl has {len(log)} bytes, {state.log_bytes} when it was saved")
    rounds = [json.loads(line)["round"] for line in log.splitlines()]
    if rounds != list(range(state.round + 1)) or not log.endswith(b"\n"):
        raise TornError(f"state of round {state.round}, but rounds.jsonl has {rounds}")
    return state.round, log


def check_goes_on(before: tuple[int, bytes], after: tuple[int, bytes]) -> None:
    """No committed round was lost, played again or changed."""
    if not after[1].startswith(before[1]):
        raise TornError(f"rounds up to {before[0]} were committed and are not the same any more")


def records(run: Path) -> list[RoundRecord]:
    """Every line of rounds.jsonl."""
    return read_rounds(run / FILE)


def asked(run: Path) -> list[list[str]]:
    """Who was asked to train, for each round from the first."""
    return [
        sorted(
            {one["client"] for one in (*record["clients"], *record["failures"])}
            | set(record["spare"])
        )
        for record in records(run)[1:]
    ]


def failed(run: Path) -> list[tuple[int, str]]:
    """(round, client) for whoever was asked and did not count, whatever the reason."""
    counted = [{one["client"] for one in record["clients"]} for record in records(run)[1:]]
    return [
        (number, name)
        for number, (names, counting) in enumerate(zip(asked(run), counted, strict=True), start=1)
        for name in names
        if name not in counting
    ]


def roster_in(logs: Iterable[str]) -> list[str] | None:
    """Who was there when the run began, from what its servers logged; None where none says it.

    The run's first factors are drawn at their largest rank.
    """
    for log in logs:
        before, began, _ = log.partition("event=round round=0 ")
        if began:
            return re.findall(r"event=present client=(\S+)", before)
    return None


def replayed(
    folder: Path,
    run: Path,
    config: Mapping[str, Any],
    sites: Mapping[str, Mapping[str, Value]],
    loopback: Loopback,
    roster: Sequence[str] | None = None,
) -> Path:
    """The same run in one process, with the same clients there and failing; its folder.

    roster: who was there when it began; None: who was asked in its first round.
    """
    told = {"config": config, "sites": sites, "asked": asked(run), "failed": failed(run)}
    return played(folder, told | ({"roster": roster} if roster else {}), loopback)


def played(folder: Path, told: Mapping[str, Any], loopback: Loopback) -> Path:
    """What tools/rehearsal/replay.py makes of this; its folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "replay.json").write_text(json.dumps(told))
    loopback.run(f"python -m tools.rehearsal.replay {folder}", folder)
    return folder / "run"


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of the adapter and of every file of the newest state.

    Of the manifest only what does not hold seconds: rounds.jsonl's length depends on them.
    """
    newest = max((run / "state").glob("round-*"))
    files = [*newest.glob("*.safetensors"), *(run / "adapter").glob("*")]
    found = {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
    }
    manifest = json.loads((newest / "manifest.json").read_bytes())
    del manifest["log_bytes"]
    return {**found, "manifest": json.dumps(manifest, sort_keys=True)}


def check_same(run: Path, reference: Path) -> None:
    """The two runs ended with the same bytes, and said the same about every round."""
    ours, theirs = fingerprint(run), fingerprint(reference)
    if odd := sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    ):
        raise TornError(f"{run} and {reference} differ in {', '.join(odd)}")
    told = [
        {r["version"]: [c["loss"] for c in r["clients"]] for r in records(path)[1:]}
        for path in (run, reference)
    ]
    if told[0] != told[1]:
        raise TornError(f"{run} and {reference} report other models or losses: {told}")
