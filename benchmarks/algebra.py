"""Stack, refactor and the wire codec over the least that any machine must do for the same result.

    stack      over np.copyto of as many bytes as the result has, into memory that is already there
    refactor   over B A, one dense product of its own factors; and beside an SVD of the dense delta
    pack       over np.copyto of as many bytes as the packed adapter has; unpack likewise

One module of 2048 x 2048; ten clients of ranks 64, 32, 16, 16, 8, 8, 4, 4, 4, 4 (sum 160), and
those ranks ten times over for a hundred. Goals: stack at most 2 (ten clients) and 5 (a hundred)
times memcpy; refactor at most 2.5 products.
"""

from collections.abc import Callable, Iterator

import numpy as np

from adapters.adapter import Adapter, Factors
from adapters.algebra import stack
from adapters.refactoring import refactor
from benchmarks.measuring import Row, alternate, progress, ratios, repeated, report
from wire.codec import pack, unpack

RANKS = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]
SCALE = 2.0
REPEATS = 15


def clients(side: int, times: int) -> list[Adapter]:
    """Trained factors of one module, for the ranks above so many times over."""
    rng = np.random.default_rng(0)
    return [
        Adapter(
            {
                "q_proj": Factors(
                    rng.standard_normal((rank, side), np.float32) / np.float32(side**0.5),
                    rng.standard_normal((side, rank), np.float32) / np.float32(side**0.5),
                    SCALE,
                )
            }
        )
        for rank in RANKS * times
    ]


def stacking(side: int, times: int, goal: float) -> Iterator[Row]:
    """stack over memcpy, into memory that is there and into memory that must first be found."""
    adapters = clients(side, times)
    weights = [1.0 / len(adapters)] * len(adapters)
    values = sum(f.a.size + f.b.size for adapter in adapters for f in adapter.values())
    source, target = np.ones(values, np.float32), np.zeros(values, np.float32)
    loops = max(1, 200 // times)
    copies: dict[str, tuple[Callable[[], object], float | None]] = {
        "memcpy": (lambda: np.copyto(target, source), goal),
        "memcpy into new memory": (source.copy, None),
    }
    for name, (copy, wanted) in copies.items():
        ours, plain = alternate(
            REPEATS,
            repeated(lambda: stack(adapters, weights), loops),
            repeated(copy, loops),
        )
        yield Row(f"stack of {len(adapters)} clients / {name}", ratios(ours, plain), wanted)


def refactoring(side: int) -> Iterator[Row]:
    """refactor over one product, over a dense SVD, and its error against float64."""
    adapters = clients(side, 1)
    stacked = stack(adapters, [1.0 / len(adapters)] * len(adapters))
    factors = stacked["q_proj"]
    ours, product = alternate(
        REPEATS,
        repeated(lambda: refactor(stacked), 5),
        repeated(lambda: factors.b @ factors.a, 5),
    )
    yield Row("refactor of sum r = 160 / one product B A", ratios(ours, product), 2.5)
    dense = factors.b @ factors.a
    svd, once = alternate(1, lambda: np.linalg.svd(dense), lambda: refactor(stacked))
    yield Row("SVD of the dense delta / refactor", ratios(svd, once))
    exact = factors.b.astype(np.float64) @ factors.a.astype(np.float64)
    result = refactor(stacked).adapter["q_proj"]
    found = result.b.astype(np.float64) @ result.a.astype(np.float64)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    yield Row("refactor, relative error against float64", [float(error)], 1e-6, kind="value")


def wire(side: int) -> Iterator[Row]:
    """pack and unpack over memcpy, for the largest client."""
    adapter = clients(side, 1)[0]
    packed = pack(adapter)
    source = np.frombuffer(packed, np.uint8)
    target = np.zeros_like(source)
    packing, unpacking, copy = alternate(
        REPEATS,
        repeated(lambda: pack(adapter), 20),
        repeated(lambda: unpack(packed), 20),
        repeated(lambda: np.copyto(target, source), 20),
    )
    yield Row("pack, float32, rank 64 / memcpy", ratios(packing, copy))
    yield Row("unpack, float32, rank 64 / memcpy", ratios(unpacking, copy))


def measure(quick: bool) -> Iterator[Row]:
    """All of them, one after the other."""
    side = 256 if quick else 2048
    progress("stack")
    yield from stacking(side, 1, 2.0)
    yield from stacking(side, 10, 5.0)
    progress("refactor")
    yield from refactoring(side)
    progress("pack and unpack")
    yield from wire(side)


if __name__ == "__main__":
    report(measure)
