"""What the machine has free: memory, on the device that trains, and disk."""

import shutil
from pathlib import Path


def free_memory() -> int | None:
    """Bytes of main memory that a new process can have; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines)}
    return int(found["MemAvailable"]) * 1024 if "MemAvailable" in found else None


def free_disk(path: Path) -> int:
    """Bytes free where this path lies or would lie."""
    return shutil.disk_usage(nearest_folder(path)).free


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    while not path.is_dir():
        path = path.parent
    return path
