"""The same small job under Flower's own Ray simulation (`flwr run .`) and in process.

Same apps, configuration and data, each as a process from its start to its end: the wall-clock
ratio, and the held-out losses side by side. A SuperLink of our own, on a free port and with its own
FLWR_HOME, is up before the clock starts and ended afterwards: `flwr run` is not charged for it.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measuring import ROOT, Row, progress, ratios, report, run_child, simulate_command

REPEATS = 1
CLIENTS = 3
JOB: dict[str, object] = {
    "clients.count": CLIENTS,
    "rounds": 2,
    "lora.rank": "16,8,4",
    "local.max-steps": 4,
    "evaluate.max-examples": 64,
}
PATIENCE_SECONDS = 120.0


def tool(name: str) -> str:
    """A command of Flower's, from the environment that runs this."""
    return str(Path(sys.executable).with_name(name))


@contextlib.contextmanager
def superlink(home: Path) -> Iterator[dict[str, str]]:
    """A SuperLink for simulations; yields the environment in which `flwr run` finds it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n\n'
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    command = [tool("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    with (home / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", port],
            cwd=home,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", process, home / "superlink.log")
        yield environment
    finally:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)


def _wait_until_up(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(address, timeout=1).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"the SuperLink did not start:\n{log.read_text()[-2000:]}")


def under_ray(environment: dict[str, str]) -> tuple[float, list[float]]:
    """Seconds of `flwr run . --stream`, and the held-out loss of each round."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        config = " ".join(
            f"{name}={json.dumps(value)}" for name, value in {**JOB, "output": str(run)}.items()
        )
        command = [tool("flwr"), "run", str(ROOT), "--stream", "--run-config", config]
        command += ["--federation-config", f"num-supernodes={CLIENTS}"]
        seconds, _, text = run_child(command, **environment)
        return seconds, _losses(run, text)


def in_process() -> tuple[float, list[float]]:
    """Seconds of `bouquet simulate`, and the held-out loss of each round."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        seconds, _, text = run_child(simulate_command(run, JOB))
        return seconds, _losses(run, text)


def _losses(run: Path, text: str) -> list[float]:
    path = run / "rounds.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    if len(lines) != int(str(JOB["rounds"])) + 1:
        raise RuntimeError(f"the run ended after {len(lines) - 1} rounds:\n{text[-4000:]}")
    return [json.loads(line)["held_out_loss"] for line in lines]


def measure(quick: bool) -> Iterator[Row]:
    """In turn: in process, under Ray."""
    ours: list[float] = []
    theirs: list[float] = []
    apart = 0.0
    with tempfile.TemporaryDirectory() as folder, superlink(Path(folder, "flwr")) as environment:
        for turn in range(1 if quick else REPEATS):
            seconds, losses = in_process()
            ray_seconds, ray_losses = under_ray(environment)
            ours.append(seconds)
            theirs.append(ray_seconds)
            apart = max(abs(a - b) for a, b in zip(losses, ray_losses, strict=True))
            progress(f"turn {turn + 1}: {seconds:.1f} s in process, {ray_seconds:.1f} s under Ray")
            for number, (a, b) in enumerate(zip(losses, ray_losses, strict=True)):
                progress(f"  held-out loss after round {number}: {a:.6f} and {b:.6f}")
    yield Row("flwr run, Ray / bouquet simulate", ratios(theirs, ours))
    yield Row("largest difference of their held-out losses", [apart], 1e-3, kind="value")


if __name__ == "__main__":
    report(measure)
