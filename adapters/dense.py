"""The delta of one module as a float64 matrix, formed where that is less work than its factors."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from adapters.adapter import Factors, Form

DoubleArray = npt.NDArray[np.float64]

BLOCK = 1024
"""Directions that are multiplied at once: the float64 copies of no more factors are ever held."""


def matrix(form: Form) -> DoubleArray:
    """S B A, (m, n).

    >>> matrix(Factors(np.ones((1, 2), np.float32), np.ones((1, 1), np.float32), 0.5)).tolist()
    [[0.5, 0.5]]
    """
    return summed([(1.0, form)], form.shape)


def summed(parts: Iterable[tuple[float, Form]], shape: tuple[int, int]) -> DoubleArray:
    """sum_i c_i delta_i, (m, n): one product of all factors side by side, and every dense part.

    It costs 2 R m n for factors of summed rank R; they are taken in blocks of about 1,024
    directions. No parts are zeros.
    """
    total = np.zeros(shape)
    block: list[tuple[float, Factors]] = []
    rank = 0
    for c, form in parts:
        if not isinstance(form, Factors):
            if c == 1.0:
                total += form.values
            elif c == -1.0:
                total -= form.values
            else:
                total += np.float64(c) * form.values
            continue
        block.append((c * form.scale, form))
        rank += form.rank
        if rank >= BLOCK:
            total += _product(block)
            block, rank = [], 0
    if block:
        total += _product(block)
    return total


def _product(block: list[tuple[float, Factors]]) -> DoubleArray:
    b, a = side_by_side(block)
    return b.T @ a


def side_by_side(parts: list[tuple[float, Factors]]) -> tuple[DoubleArray, DoubleArray]:
    """[c_1 B_1 | ...]' (R, m) and [A_1 ; ...] (R, n), whose delta is sum_i c_i B_i A_i."""
    rank = sum(f.rank for _, f in parts)
    m, n = parts[0][1].shape
    b, a = np.empty((rank, m)), np.empty((rank, n))
    at = 0
    for c, f in parts:
        rows = slice(at, at + f.rank)
        np.multiply(f.b.T, np.float64(c), out=b[rows])
        a[rows] = f.a
        at += f.rank
    return b, a
