"""Kill a federation's processes at random moments and see that it survives.

    python -m tools.soak                                  # 20 kills of each kind
    python -m tools.soak --kinds serverapp --kills 5 --seed 1 --output /tmp/soak

A SuperLink and three SuperNodes with TLS and node keys, as `bouquet deploy init` writes them, with
clients that train nothing (tools/rehearsal/quick_client.py), play runs of a few rounds. In each,
kill -9 meets one kind of process at moments drawn from the seed: serverapp, superlink, supernode,
clientapp. Then this does what docs/deploy.md tells the operator, and nothing else: a SuperLink is
started again, a SuperNode too, as often as it ends (as systemd does); `flwr run` is given again
after a crash of the server, and once the run has ended without its result.

After each take-up: no committed round changed, every line whole, rounds consecutive, state loads.
After each run: the bytes of adapter and state are those of a run in one process that was never
interrupted and in which the same clients missed the same rounds.
Exits with 1 at the first thing that is not so; logs stay in the output folder.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.rehearsal.loopback import ENDS_WITH_US, cpu_seconds
from tools.rehearsal.quick_client import TRAINING
from tools.rehearsal.small_federation import SmallFederation
from tools.soak_checks import (
    TornError,
    asked,
    check_goes_on,
    check_same,
    committed,
    failed,
    replayed,
    roster_in,
)
from tools.soak_summary import Kill, summary

KINDS = ("serverapp", "superlink", "supernode", "clientapp")
SITES: dict[str, dict[str, Any]] = {
    "oslo": {"rank": 3},
    "bergen": {"rank": 2},
    "tromso": {"rank": 1},
}
ROUNDS = 8
LONGEST_QUIET_SECONDS = 15.0
"""A kill comes at most this long after the take-up from the one before: some two rounds."""
PATIENCE_SECONDS = 300.0
RESTART_SECONDS = 5.0
LOOKS_AGAIN_SECONDS = 2.0  # an operator does not type faster
AT_WORK_SECONDS = 0.2
"""Of processor time: a ClientApp that has used less may not have its message yet."""


class Soak:
    """One federation, its runs and its kills."""

    def __init__(self, folder: Path, strategy: str, seed: int) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._log = (folder / "events.log").open("a")
        same_rank = strategy in ("fedavg", "fedsa-lora")
        self._sites = {name: {"rank": 2} for name in SITES} if same_rank else SITES
        self._personal = strategy == "fedsa-lora"
        self._config: dict[str, Any] = {
            "rounds": ROUNDS,
            "seed": seed,
            "resume": True,
            "strategy": {"name": strategy},
            "clients": {"min-replies": 2, "timeout-seconds": 15.0},
            "evaluate": {"server": False},
        }
        self._ended: dict[str, float] = {}
        self.restarts = 0
        """Of SuperNodes: how often one was started again."""
        self.kills: list[Kill] = []
        self.runs: list[tuple[str, int]] = []
        """Name, and how many clients missed a round."""
        self.federation = SmallFederation(
            folder / "federation",
            "server.app:app",
            "tools.rehearsal.quick_client:app",
            self._sites,
            prefix=ENDS_WITH_US,
            environment={TRAINING: "0.7"},
        )
        self._loopback = self.federation.loopback

    def say(self, text: str) -> None:
        """To whoever watches, and to events.log."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, file=self._log, flush=True)
        print(line, flush=True)

    def soak(self, kind: str, kills: int) -> None:
        """Runs with kills of one kind until there were so many."""
        done, number = 0, 0
        while done < kills:
            number += 1
            before = len(self.kills)
            self._play(kind, f"{kind}-{number}", kills - done)
            done += len(self.kills) - before

    def _play(self, kind: str, name: str, most: int) -> None:
        """One run to its end, with at most so many kills, then compared."""
        run = self.federation.coordinator / "runs" / name
        config = {**self._config, "output": f"runs/{name}"}
        commands = self._command(name, 0, config)
        killed = 0
        while not self._is_whole(run):
            quiet = self._random.uniform(0.0, LONGEST_QUIET_SECONDS)
            self._restart_sites()
            if killed < most and not self._wait(lambda: self._is_whole(run), quiet):
                kill = self._kill(kind, name, run)
                if kill is None:
                    continue
                killed += 1
                commands = self._take_up(kill, name, run, config, commands)
            elif killed == most:
                commands = self._see_it_through(name, run, config, commands)
        lost = failed(run)
        away = sum(len(self._sites) - len(names) for names in asked(run))
        reference = replayed(
            self._folder / "replays" / name,
            run,
            config,
            self._sites,
            self._loopback,
            roster_in(self._loopback.log(f"run-{name}-{k + 1}") for k in range(commands)),
        )
        check_same(run, reference)
        self.runs.append((name, len(lost) + away))
        self.say(f"run={name} kills={killed} failed={lost} away={away} bytes=identical")
        self._wait(lambda: self._loopback.has_ended(f"run-{name}-{commands}"), PATIENCE_SECONDS)

    def _see_it_through(self, name: str, run: Path, config: dict[str, Any], commands: int) -> int:
        """No more kills: a run that fails is taken up until its result is there."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while not self._is_whole(run):
            if time.monotonic() > give_up:
                raise TornError(f"{name} does not end")
            self._restart_sites()
            if self._has_ended_early(name, commands):
                commands = self._command(name, commands, config)
                self.say(f"command run={name} because it had failed")
            time.sleep(0.3)
        return commands

    def _command(self, name: str, given: int, config: dict[str, Any]) -> int:
        """Give `flwr run`; how often it was given by now."""
        self.federation.start_run(f"run-{name}-{given + 1}", config)
        return given + 1

    def _is_whole(self, run: Path) -> bool:
        """The result is there."""
        if not self._personal:
            return (run / "adapter" / "adapter_model.safetensors").exists()
        return self._committed(run)[0] == ROUNDS

    def _committed(self, run: Path) -> tuple[int, bytes]:
        """Looked at while a server writes: what changes meanwhile is looked at again."""
        for attempt in range(5):
            try:
                return committed(run)
            except (OSError, ValueError, TornError) as error:
                if attempt == 4:
                    raise TornError(str(error)) from error
                time.sleep(0.2)
        raise AssertionError

    def _kill(self, kind: str, name: str, run: Path) -> Kill | None:
        """Kill -9 one process of this kind; None where there is none now."""
        if kind in ("serverapp", "clientapp"):
            hosts = ["superlink"] if kind == "serverapp" else list(self._sites)
            program = {"serverapp": "flwr-serverapp", "clientapp": "flwr-clientapp"}[kind]
            least = AT_WORK_SECONDS if kind == "clientapp" else 0.0
            found = [
                (host, pid)
                for host in hosts
                for pid in self._loopback.tasks_of(host, program)
                if cpu_seconds(pid) > least
            ]
            if not found:
                return None
            victim, pid = self._random.choice(found)
            kill = Kill(kind, name, victim, self._committed(run)[0])
            self._loopback.kill_pid(pid)
        else:
            alive = [site for site in self._sites if not self._loopback.has_ended(site)]
            if kind == "supernode" and not alive:
                return None
            victim = "superlink" if kind == "superlink" else self._random.choice(alive)
            kill = Kill(kind, name, victim, self._committed(run)[0])
            self._loopback.kill(victim)
        self.say(f"kill={kind} victim={victim} run={name} committed={kill.after_round}")
        return kill

    def _take_up(
        self, kill: Kill, name: str, run: Path, config: dict[str, Any], commands: int
    ) -> int:
        """What the operator does, until a round is committed that was not; commands so far."""
        began = time.monotonic()
        before = self._committed(run)
        if kill.kind == "superlink":
            self.federation.start_superlink()
        while True:
            self._restart_sites()
            after = self._committed(run)
            check_goes_on(before, after)
            if after[0] > before[0] or self._is_whole(run):
                break
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise TornError(f"{name} is not taken up {PATIENCE_SECONDS:g} s after {kill}")
            if self._needs_command(kill, name, commands):
                commands = self._command(name, commands, config)
                kill.commands += 1
            time.sleep(0.3)
        kill.take_up_seconds = time.monotonic() - began
        self.kills.append(kill)
        self.say(
            f"taken-up run={name} round={after[0]} seconds={kill.take_up_seconds:.1f} "
            f"commands={kill.commands}"
        )
        return commands

    def _restart_sites(self) -> None:
        """As systemd does: whoever has ended is started again, some seconds later.

        The SuperLink refuses a SuperNode that was killed until it misses its heartbeats: a minute.
        """
        for name in self._sites:
            if not self._loopback.has_ended(name):
                self._ended.pop(name, None)
            elif (
                time.monotonic() - self._ended.setdefault(name, time.monotonic()) > RESTART_SECONDS
            ):
                self.federation.start_sites([name], wait=False)
                self.restarts += 1

    def _needs_command(self, kill: Kill, name: str, commands: int) -> bool:
        """An operator gives it again: at once after a crash of the server, or once it has ended."""
        if kill.kind in ("serverapp", "superlink") and not kill.commands:
            return True
        return self._has_ended_early(name, commands)

    def _has_ended_early(self, name: str, commands: int) -> bool:
        ended = self._loopback.has_ended(f"run-{name}-{commands}")
        if ended:
            time.sleep(LOOKS_AGAIN_SECONDS)
        return ended and not self._is_whole(self.federation.coordinator / "runs" / name)

    def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether it came true within so many seconds."""
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            if condition():
                return True
            time.sleep(0.1)
        return condition()


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--strategy", default="flora-warm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for logs; must not exist")
    arguments = parser.parse_args()
    folder = arguments.output or Path(tempfile.mkdtemp(prefix="bouquet-soak-"))
    (folder / "federation").mkdir(parents=True)
    print(f"logs in {folder}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # after cleaning up
    soak = Soak(folder, arguments.strategy, arguments.seed)
    try:
        soak.federation.start()
        for kind in arguments.kinds.split(","):
            soak.soak(kind, arguments.kills)
    except (TornError, AssertionError) as error:
        soak.say(f"FAILED {type(error).__name__}: {error}")
        return 1
    finally:
        soak.federation.loopback.stop()
        (folder / "kills.json").write_text(json.dumps([asdict(kill) for kill in soak.kills]))
        print(summary(soak.kills, soak.runs, soak.restarts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
