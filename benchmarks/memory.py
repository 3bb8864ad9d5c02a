"""Peak memory of a simulation with 10 and 50 clients over that with one, clients' settings equal.

Each is a process of its own, and its peak the largest resident set that the kernel saw (ru_maxrss):
interpreter, libraries, model, data and all. Every client has the same rank and steps and as many
examples as any other, whatever their count. The server does not evaluate, because that takes the
same memory for any number of clients and would hide what grows. Goals: at most 1.15 and 1.3 times
the memory of one client.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measuring import Row, progress, ratios, report, run_child, simulate_command

REPEATS = 1
GOALS = {10: 1.15, 50: 1.3}
CLIENT: dict[str, object] = {
    "rounds": 2,
    "lora.rank": 16,
    "data.partition": "iid",
    "evaluate.server": "false",
}
EXAMPLES = 130
QUICK: dict[str, object] = {"rounds": 1, "local.max-steps": 1}


def peak_bytes(clients: int, settings: dict[str, object]) -> float:
    """Peak bytes of one `bouquet simulate` with so many clients."""
    with tempfile.TemporaryDirectory() as folder:
        counts = {"clients.count": clients, "data.max-examples": EXAMPLES * clients}
        command = simulate_command(Path(folder, "run"), settings | counts)
        _, peak, _ = run_child(command)
    return float(peak)


def measure(quick: bool) -> Iterator[Row]:
    """One client, ten, fifty, and again."""
    settings = CLIENT | (QUICK if quick else {})
    peaks: dict[int, list[float]] = {clients: [] for clients in (1, *GOALS)}
    for turn in range(1 if quick else REPEATS):
        for clients, kept in peaks.items():
            kept.append(peak_bytes(clients, settings))
        progress(
            f"turn {turn + 1}: "
            + ", ".join(f"{kept[-1] / 1e6:.0f} MB ({n} clients)" for n, kept in peaks.items())
        )
    for clients, goal in GOALS.items():
        quantity = f"peak memory, {clients} clients / 1 client"
        yield Row(quantity, ratios(peaks[clients], peaks[1]), goal)


if __name__ == "__main__":
    report(measure)
