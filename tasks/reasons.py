"""Why an example is left out, and what befalls those that train: each under its own name.

Reading counts rows that are null, empty or identical, and test examples that are trained on;
encoding counts the others. An example counts under one reason of `DROPPED`, or under any number of
the others.
"""

from collections.abc import Mapping, Sequence

from core.errors import UsageError, listing
from settings.run import DataSettings

Counts = Mapping[str, int]
"""Reason -> how many examples."""
NULL = "null"
IDENTICAL = "identical"
NULL_PROMPT = "null-prompt"
TEST_SEEN = "test-seen"
CUT = "cut"
SHORTENED = "shortened-prompt"
SPECIAL = "special-tokens"
AS_TOKENS = "special-tokens-in-text"
REWRITTEN = "rewritten"
ENDLESS = "endless"
EMPTY = "empty"
NO_ROOM = "no-room"
NO_ASSISTANT = "no-assistant"
TOO_SHORT = "too-short"
UNSAFE = "unsafe"
DROPPED = (NULL, EMPTY, NO_ROOM, NO_ASSISTANT, TOO_SHORT, UNSAFE)
SENTENCES = {
    NULL: "left out, the response or text is null",
    CUT: "the end is cut off at data.context={context} tokens",
    SHORTENED: "the prompt is cut off at data.max-prompt={limit} tokens",
    EMPTY: "left out, the response or text is empty",
    NO_ROOM: "left out, data.context={context} leaves no room for a response",
    NO_ASSISTANT: "left out, no turn is the assistant's",
    TOO_SHORT: "left out, a single token has nothing to be predicted from",
    UNSAFE: "left out, this tokenizer finds special tokens in the plain text",
    SPECIAL: "special tokens of the tokenizer in what the data say, read as plain text",
    AS_TOKENS: "special tokens of the tokenizer in running text, which train as such",
    REWRITTEN: "the chat template changes or leaves out what a turn says",
    NULL_PROMPT: "the prompt is null or not there, and trains as an empty one",
    IDENTICAL: "the same as an earlier one",
    TEST_SEEN: "in the test set and in the training data",
    ENDLESS: "no special token ends the text or turn, so the model does not learn to stop",
}
ALL_ALIKE = {
    EMPTY: "all {examples} responses{of} are empty: fill them, or name their field with "
    "data.response",
    NO_ROOM: "none of {examples} examples{of} leaves room for a response within "
    "data.context={context} tokens: raise it, or lower data.max-prompt",
    NO_ASSISTANT: "none of {examples} conversations{of} has a turn of the assistant, so there is "
    "nothing to learn: check the roles of their messages",
    TOO_SHORT: "all {examples} examples{of} are single tokens, and there is nothing to predict "
    "them from: name longer text with data.text or data.response",
    UNSAFE: "all {examples} examples{of} spell special tokens that this tokenizer cannot read as "
    "plain text: take such words out of the data",
}
NO_TEXT = "none of {examples} examples{of} has a text to classify: name its field with data.text"


def count_lines(counts: Counts, data: DataSettings) -> list[str]:
    """What a person should know of how examples were encoded, a line for each reason.

    >>> from settings.run import run_settings
    >>> count_lines({"cut": 1, "empty": 1200}, run_settings().data)[1]
    '1,200 examples: left out, the response or text is empty'
    """
    return [
        f"{counts[reason]:,} example{'' if counts[reason] == 1 else 's'}: "
        + words.format(context=data.context, limit=data.max_prompt)
        for reason, words in SENTENCES.items()
        if counts.get(reason)
    ]


def refusal(
    counts: Counts, examples: int, files: Sequence[str], data: DataSettings, classes: bool
) -> UsageError:
    """Why none of these examples can be used.

    files: where they come from.
    classes: they are texts to classify.
    """
    words: dict[str, object] = {
        "examples": f"{examples:,}",
        "of": f" of {listing(files)}" if any(files) else "",
        "context": data.context,
    }
    dropped = {reason: counts[reason] for reason in DROPPED if counts.get(reason)}
    if not examples:
        return UsageError("there is no example here to train on or to evaluate")
    if classes:
        return UsageError(NO_TEXT.format(**words))
    if len(dropped) == 1 and (reason := next(iter(dropped))) in ALL_ALIKE:
        return UsageError(ALL_ALIKE[reason].format(**words))
    return UsageError(
        "none of {examples} examples{of} can be used: ".format(**words)
        + "; ".join(count_lines(dropped, data))
    )
