"""Random adapters for property-based tests: odd shapes, mixed ranks, every scale rule, bad numbers.

Hypothesis chooses shape, rank, kind and seed; the entries come from NumPy, so that a failing
example stays small to read.
"""

from collections.abc import Sequence

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from adapters.adapter import Adapter, Factors

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)

NAMES = ("layers.1.q_proj", "layers.11.q_proj", "layers.1.k_proj", "q_proj", "lm_head")
# Most sizes are ranks too, so that a dimension equals a rank; and ranks go beyond every dimension.
SIZES = (1, 2, 3, 5, 8, 13)
RANKS = (0, 1, 2, 3, 5, 8, 21)
ALPHAS = (0.5, 1.0, 8.0, 16.0, 33.0)

PLAIN = ("normal",)
AWKWARD = (
    "normal",
    "A large, B small",
    "A small, B large",
    "columns repeated",
    "A of rank one",
    "graded",
    "half of A zero",
    "B zero",
)


def make_factors(
    rng: np.random.Generator, shape: tuple[int, int], rank: int, scale: float, kind: str = "normal"
) -> Factors:
    """Factors with standard normal entries, bent to `kind`."""
    (m, n), r = shape, rank
    a, b = rng.standard_normal((r, n)), rng.standard_normal((m, r))
    match kind:
        case "A large, B small":
            a, b = a * 1e6, b * 1e-6
        case "A small, B large":
            a, b = a * 1e-6, b * 1e6
        case "columns repeated":
            a, b = np.repeat(a[:1], r, axis=0), np.repeat(b[:, :1], r, axis=1)
        case "A of rank one":
            a = rng.standard_normal((r, 1)) * rng.standard_normal((1, n))
        case "graded":
            b = b * 10.0 ** -np.arange(r)
        case "half of A zero":
            a[::2] = 0.0
        case "B zero":
            b[:] = 0.0
    return Factors(a.astype(np.float32), b.astype(np.float32), scale)


def make_adapter(
    seed: int,
    shapes: dict[str, tuple[int, int]],
    rank: int,
    scale: float = 1.0,
    kind: str = "normal",
) -> Adapter:
    """An adapter of one rank, scale and kind, for tests that name their own numbers."""
    rng = np.random.default_rng(seed)
    return Adapter({name: make_factors(rng, shapes[name], rank, scale, kind) for name in shapes})


@st.composite
def shapes(draw: st.DrawFn, sizes: Sequence[int] = SIZES) -> dict[str, tuple[int, int]]:
    """One to three modules with their (m, n)."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    size = st.sampled_from(sizes)
    return {name: (draw(size), draw(size)) for name in names}


@st.composite
def adapters(
    draw: st.DrawFn,
    over: dict[str, tuple[int, int]] | None = None,
    kinds: Sequence[str] = AWKWARD,
    ranks: Sequence[int] = RANKS,
) -> Adapter:
    """An adapter whose modules differ in rank, in kind and in scale: alpha/r or alpha/sqrt(r)."""
    over = draw(shapes()) if over is None else over
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    modules = {}
    for name, shape in over.items():
        rank = draw(st.sampled_from(ranks))
        alpha, rslora = draw(st.sampled_from(ALPHAS)), draw(st.booleans())
        scale = alpha / max(rank, 1) ** (0.5 if rslora else 1.0)
        modules[name] = make_factors(rng, shape, rank, scale, draw(st.sampled_from(kinds)))
    return Adapter(modules)


@st.composite
def cohorts(
    draw: st.DrawFn, kinds: Sequence[str] = AWKWARD, ranks: Sequence[int] = RANKS
) -> tuple[list[Adapter], list[float]]:
    """One to four clients on the same modules, and weights that sum to 1, some of them tiny."""
    over = draw(shapes())
    clients = draw(st.lists(adapters(over, kinds, ranks), min_size=1, max_size=4))
    counts = [draw(st.sampled_from([1, 7, 100, 10**6])) for _ in clients]
    return clients, [count / sum(counts) for count in counts]
