"""Labels as values: 0, 0.0 and "0" are one label, 007 is another."""

import re
from decimal import Decimal, InvalidOperation

JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
MOST_DIGITS = 40
"""Numbers that would take more digits keep their exponent."""


def canonical_label(text: str) -> str:
    """The one way of writing a label: without space around it, a number by its value.

    A number is what JSON calls one; 007, +1 and .5 are text. True is true.

    >>> [canonical_label(text) for text in ("0.00", "-0", "1e0", " 12.50 ", "007", "True")]
    ['0', '0', '1', '12.5', '007', 'true']
    """
    text = text.strip()
    if text.lower() in ("true", "false"):  # as JSON and as Python write them
        return text.lower()
    if not JSON_NUMBER.fullmatch(text):
        return text
    try:
        sign, digits, exponent = Decimal(text).as_tuple()
    except InvalidOperation:  # an exponent beyond all bounds
        return text
    if not any(digits):
        return "0"
    assert isinstance(exponent, int)
    while digits[-1] == 0:
        digits, exponent = digits[:-1], exponent + 1
    value = Decimal((sign, digits, exponent))
    return f"{value:f}" if abs(exponent) + len(digits) <= MOST_DIGITS else str(value)


def label_order(labels: set[str]) -> list[str]:
    """Sorted as numbers where all of them are, else as text.

    >>> label_order({"10", "9", "-1.5"}), label_order({"10", "9", "b"})
    (['-1.5', '9', '10'], ['10', '9', 'b'])
    """
    if all(JSON_NUMBER.fullmatch(label) for label in labels):
        return sorted(labels, key=lambda label: (Decimal(label), label))
    return sorted(labels)
