"""A run's folder: configuration, one line a round, state, adapter.

runs/NAME/config.toml     everything needed to repeat the run, versions included
runs/NAME/data.json       each file of the data with its hash, as far as this machine reads them
runs/NAME/start-adapter/  the adapter that the run began from, where it did: start_adapter.py
runs/NAME/rounds.jsonl    one JSON object a round, round 0 being the base model
runs/NAME/state/          see journal/state.py
runs/NAME/adapter/        the global model as a PEFT adapter
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from adapters.adapter import Delta
from adapters.head import Head
from adapters.peft_files import write_peft
from adapters.refactoring import refactor
from core.errors import BouquetError, UsageError
from core.events import log, logfmt
from core.files import flush_folder, write_durably
from journal.data_files import refuse_changed_data
from journal.going_on import how_to_go_on
from journal.record import FILE, RoundRecord, append_round, read_rounds
from journal.state import ServerState, load_state, save_state
from settings.keys import Value, flatten, flatten_tables
from settings.knobs import KNOBS, fold_knobs
from settings.run import MAY_CHANGE_ON_RESUME, RunSettings

VERSIONED = ("bouquet", "flwr", "torch", "transformers", "peft", "numpy", "tokenizers")
LOCK_TRIES = 5
LOCK_PAUSE_SECONDS = 0.1


class RunFolder:
    """The folder of one run. Every file in it is written whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state_path = path / "state"
        self.adapter_path = path / "adapter"
        self._log_path = path / FILE

    def check_fits(self, settings: RunSettings) -> None:
        """UsageError where a run with these settings can neither begin here nor go on."""
        if settings.resume and (self.path / "config.toml").is_file():
            self.check_same(settings)
        elif not settings.resume and self.path.exists() and not self.never_began():
            raise self._exists()

    def never_began(self) -> bool:
        """Whether a run was opened here that ended before its first answer was saved."""
        config = self.path / "config.toml"
        return config.is_file() and not (self.state_path.exists() or self._log_path.exists())

    def _exists(self) -> UsageError:
        return UsageError(
            f"{self.path} exists already. Choose another output, leave it out for a new number, or "
            f"{how_to_go_on(self.path)}"
        )

    def create(
        self,
        settings: RunSettings,
        data: Mapping[str, Any] | None = None,
        head: Mapping[str, str] | None = None,
    ) -> None:
        """Make the folder, and write what a run begins with."""
        self.make(settings)
        self.write_beginning(settings, data, head)

    def make(self, settings: RunSettings) -> None:
        """Make the folder alone.

        UsageError where it exists already, unless what made it may have died right then.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=settings.resume or self.never_began())
        except FileExistsError:
            raise self._exists() from None
        except OSError as error:
            raise UsageError(f"{self.path} cannot be made: {error.strerror}") from error

    def write_beginning(
        self,
        settings: RunSettings,
        data: Mapping[str, Any] | None = None,
        head: Mapping[str, str] | None = None,
    ) -> None:
        """Write config.toml, and before it data.json where there are `data`.

        head: what else stands at the top of config.toml.
        """
        if data is not None:
            self.write("data.json", (json.dumps(data, indent=1) + "\n").encode())
        tables = {**(head or {}), "config": _nested(flatten(settings)), "versions": versions()}
        self.write("config.toml", tomli_w.dumps(tables).encode())

    def keep_config(self, settings: RunSettings) -> None:
        """Bring config.toml up to what the run goes on with: more rounds, or labels told since."""
        tables = tomllib.loads((self.path / "config.toml").read_text())
        if tables["config"] != (now := _nested(flatten(settings))):
            self.write("config.toml", tomli_w.dumps({**tables, "config": now}).encode())

    def data(self) -> dict[str, Any] | None:
        """What data.json says; None where there is none.

        Raises BouquetError where it cannot be read.
        """
        path = self.path / "data.json"
        try:
            return dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise BouquetError(f"{path} cannot be read: {error}") from error

    def check_same(self, settings: RunSettings) -> None:
        """UsageError where settings differ from the run's in anything that may not change."""
        before = {KNOBS: "", **fold_knobs(read_config(self.path / "config.toml"))}
        now = flatten(settings)
        for name, value in before.items():
            # Where no key names the labels, the clients tell them, once they are asked.
            open_still = name == "data.labels" and not (value and now.get(name))
            if name not in MAY_CHANGE_ON_RESUME and now.get(name) != value and not open_still:
                raise UsageError(
                    f"a resumed run keeps its configuration, but {name} was {value!r} and is now "
                    f"{now.get(name)!r}; only {', '.join(MAY_CHANGE_ON_RESUME)} may change"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes this run meanwhile; a process that dies lets go.

        UsageError where another process holds it: two servers of one run would tear its log.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            if not _takes_lock(descriptor):
                raise UsageError(
                    f"another process is running {self.path}: wait until it has ended, stop it "
                    "(under Flower: flwr stop RUN-ID), or choose another output"
                )
            yield
        finally:
            os.close(descriptor)

    def is_locked(self) -> bool:
        """Whether a process runs it now."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def load(self, wire_dtype: str) -> ServerState | None:
        """The newest whole state, with rounds.jsonl cut back to where it was saved.

        wire_dtype: the number format in which the pieces of merged travel.
        """
        state = load_state(self.state_path, wire_dtype)
        length = state.log_bytes if state else 0
        if self._log_path.exists():
            if self._log_path.stat().st_size < length:
                raise BouquetError(
                    f"{self._log_path} is shorter than when its newest round was saved: it was "
                    "changed since, and the run cannot go on"
                )
            if surplus := self._log_path.stat().st_size - length:
                log.warning(logfmt("log-cut-back", path=self._log_path, bytes=surplus))
            os.truncate(self._log_path, length)
        return state

    def append(self, record: RoundRecord) -> int:
        """Add one line to rounds.jsonl; its length in bytes afterwards."""
        return append_round(self._log_path, record, how_to_go_on(self.path))

    def save(self, state: ServerState) -> None:
        """Commit a state: from here on a resume begins after its round."""
        save_state(state, self.state_path)

    def rounds(self) -> list[RoundRecord]:
        """The records so far, round 0 first, without a line that is being written."""
        return read_rounds(self._log_path)

    def export(
        self,
        delta: Delta,
        base_model: str,
        head: Head | None = None,
        labels: tuple[str, ...] = (),
    ) -> None:
        """The global model as PEFT files, at its lowest lossless rank."""
        scratch = self.path / ".writing-adapter"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            write_peft(refactor(delta).adapter, scratch, base_model, head, labels)
            shutil.rmtree(self.adapter_path, ignore_errors=True)
            scratch.rename(self.adapter_path)
            flush_folder(self.path)
        except OSError as error:
            raise BouquetError(
                f"the adapter could not be written to {self.adapter_path}: {error.strerror}. The "
                f"run itself is saved: {how_to_go_on(self.path)}"
            ) from error

    def write(self, name: str, data: bytes) -> None:
        """A file in the folder, whole or not at all; BouquetError if the disk does not take it."""
        scratch = self.path / f".writing-{name}"
        try:
            write_durably(scratch, data)
            scratch.rename(self.path / name)
        except OSError as error:
            raise BouquetError(f"{self.path / name} could not be written: {error}") from error


def _takes_lock(descriptor: int) -> bool:
    """Whether this process holds the folder now; `is_locked` elsewhere holds it for an instant."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_SECONDS)
        else:
            return True
    return False


@contextmanager
def open_run_folder(
    settings: RunSettings, data: Mapping[str, Any] | None = None
) -> Iterator[tuple[RunFolder, ServerState | None]]:
    """The folder that settings ask for, locked: a new one, or with `resume` the existing one's.

    data: each file that the server reads, with its hash (server/data_record.py), for a new one.
    """
    folder = RunFolder(Path(settings.output) if settings.output else next_output(settings))
    goes_on = _goes_on(settings)
    if goes_on:
        folder.check_same(settings)
    else:
        folder.make(settings)
    with folder.locked():
        if not goes_on:  # whoever watches finds it locked as soon as it is a run
            folder.write_beginning(settings, data)
        yield folder, folder.load(settings.wire.dtype) if goes_on else None


def peek_state(settings: RunSettings) -> ServerState | None:
    """The state that a run with these settings will go on from; None where it will begin."""
    if not settings.resume or not settings.output:
        return None
    return load_state(Path(settings.output) / "state", settings.wire.dtype)


def refuse_other_data(settings: RunSettings, data: Mapping[str, Any] | None) -> None:
    """UsageError where the run that goes on was begun on other files; None: the server reads none.

    data: each file with its hash, as it is now.
    """
    if data is not None and _goes_on(settings):
        folder = RunFolder(Path(settings.output))
        refuse_changed_data(folder.data() or {}, data, str(folder.path))


def _goes_on(settings: RunSettings) -> bool:
    begun = settings.output != "" and (Path(settings.output) / "config.toml").is_file()
    return settings.resume and begun


def next_output(settings: RunSettings) -> Path:
    """runs/STRATEGY-001, or the next number that is free."""
    number = 1
    name = settings.strategy.name.rpartition(":")[2]  # of package.module:Name, the last
    while (path := Path("runs", f"{name}-{number:03d}")).exists():
        number += 1
    return path


def read_config(path: Path, lists: bool = True) -> dict[str, Value]:
    """Flat keys from a run's config.toml, or from any TOML file of configuration keys.

    lists: False refuses what `flwr run` would not take: lists, and knobs by keys of their own.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    try:
        values = flatten_tables(tables.get("config", tables), lists=lists)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    knobs = fold_knobs(values)
    if not lists and KNOBS in knobs and knobs[KNOBS] != values.get(KNOBS):
        raise UsageError(
            f"{path}: flwr run takes only keys that pyproject.toml names, and a method's knobs as "
            f"text: write {KNOBS} = {json.dumps(knobs[KNOBS], ensure_ascii=False)}"
        )
    return values


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _nested(flat: Mapping[str, Value]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
        table[last] = value
    return tables
