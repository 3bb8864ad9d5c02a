"""Token ids decode back to template, prompt, response and ending, cut where the context ends."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import UsageError
from settings.keys import Value
from settings.run import DataSettings, run_settings
from tasks.encoding import Encoded, Encoding, encode
from tasks.examples import Example
from tests.adapter_generators import QUICK
from tests.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

TEMPLATE = "Question: {prompt}\nAnswer: "


def settings(**values: Value) -> DataSettings:
    """Data settings with the template above; `max_prompt=3` sets data.max-prompt."""
    layer = {f"data.{name.replace('_', '-')}": value for name, value in values.items()}
    pinned: dict[str, Value] = {"data.path": "mine.jsonl", "data.template": TEMPLATE}
    return run_settings(pinned, layer).data


def pairs(*texts: tuple[str, str]) -> list[Example]:
    return [Example(prompt, response, "") for prompt, response in texts]


def halves(tokenizer: Any, encoded: Encoded) -> tuple[str, str]:
    """What lies before the loss and what counts in it, special tokens included."""
    ids = encoded.ids.tolist()
    return tokenizer.decode(ids[: encoded.loss_from]), tokenizer.decode(ids[encoded.loss_from :])


def one(tokenizer: Any, example: tuple[str, str], **values: Value) -> tuple[str, str]:
    """The two halves of the only example."""
    encoding = encode(tokenizer, pairs(example), settings(**values))
    assert (len(encoding.examples), encoding.cut, encoding.dropped) == (1, 0, 0)
    return halves(tokenizer, encoding.examples[0])


@pytest.mark.parametrize("text", ["why?", "Köln 東京 🌷", "  two\n\nlines ", ""])
def test_prompt_goes_through_the_template_and_the_response_counts(text: str) -> None:
    before, counts = one(tiny_tokenizer(), (text, "so that\n é🌷"), ending="\n##")
    assert before == f"<s>Question: {text}\nAnswer: "
    assert counts == "so that\n é🌷\n##</s>"


@pytest.mark.parametrize(
    ("tokenizer", "begin", "end"),
    [
        (tiny_tokenizer(adds="bos"), "<s>", "</s>"),
        (tiny_tokenizer(adds="both"), "<s>", "</s>"),
        (tiny_tokenizer(adds="eos"), "", "</s>"),
        (tiny_tokenizer(adds=""), "", "</s>"),
        (tiny_tokenizer(bos=None, adds=""), "", "</s>"),
        (tiny_tokenizer(bos=None, eos=None, adds=""), "", ""),
        (tiny_tokenizer("<|end|>", "<|end|>", adds=""), "", "<|end|>"),
        (tiny_tokenizer("<|end|>", "<|end|>", adds="bos"), "<|end|>", "<|end|>"),
        (tiny_tokenizer("<|end|>", "<|end|>", adds="both"), "<|end|>", "<|end|>"),
    ],
    ids=["bos", "both", "eos", "adds none", "no bos", "none", "one", "one as bos", "one as both"],
)
@pytest.mark.parametrize("head", ["", "Q: "])
def test_one_end_token_closes_and_the_tokenizers_own_beginning_opens(
    tokenizer: Any, begin: str, end: str, head: str
) -> None:
    before, counts = one(tokenizer, ("why?", "because"), template=f"{head}{{prompt}}\n")
    assert before == f"{begin}{head}why?\n"
    assert counts == f"because{end}"


def test_the_prompts_tokens_do_not_depend_on_the_response() -> None:
    tokenizer = tiny_tokenizer()
    examples = pairs(("the sum", "of two"), ("the sum", " and nothing"), ("the sum", "\nx"))
    encoded = encode(tokenizer, examples, settings(template="{prompt}")).examples
    starts = {tuple(example.ids[: example.loss_from]) for example in encoded}
    assert starts == {tuple(tokenizer("the sum")["input_ids"])}


def test_braces_in_the_data_are_text() -> None:
    before, counts = one(tiny_tokenizer(), ("{prompt} {x}", "{prompt}{}"))
    assert before == "<s>Question: {prompt} {x}\nAnswer: "
    assert counts == "{prompt}{}</s>"


def test_a_long_prompt_keeps_its_beginning() -> None:
    tokenizer = tiny_tokenizer()
    text = "0123456789" * 3
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    before, counts = one(tokenizer, (text, "yes"), max_prompt=6)
    assert before == f"<s>Question: {tokenizer.decode(tokens[:6])}\nAnswer: "
    assert counts == "yes</s>"


def test_a_long_response_loses_its_end_and_is_counted_as_cut() -> None:
    tokenizer = tiny_tokenizer()
    examples = pairs(("why?", "0123456789" * 20), ("why?", "yes"))
    encoding = encode(tokenizer, examples, settings(context=40))
    assert (encoding.cut, encoding.dropped) == (1, 0)
    long, short = encoding.examples
    assert len(long.ids) == 40
    before, counts = halves(tokenizer, long)
    assert before == "<s>Question: why?\nAnswer: "
    assert ("0123456789" * 20).startswith(counts)
    assert halves(tokenizer, short)[1] == "yes</s>"


def test_a_response_that_just_fits_is_not_cut() -> None:
    tokenizer = tiny_tokenizer()
    whole = encode(tokenizer, pairs(("why?", "because")), settings()).examples[0]
    for context, cut in ((len(whole.ids), 0), (len(whole.ids) - 1, 1)):
        encoding = encode(tokenizer, pairs(("why?", "because")), settings(context=context))
        assert encoding.cut == cut
        assert encoding.examples[0].ids.tolist() == whole.ids.tolist()[:context]


def test_a_template_that_leaves_no_room_drops_the_example() -> None:
    encoding = encode(tiny_tokenizer(), pairs(("why?", "because")), settings(context=8))
    assert (encoding.examples, encoding.cut, encoding.dropped) == ([], 0, 1)


@pytest.mark.parametrize("ending", ["", "###"])
def test_an_empty_response_is_dropped_whatever_the_ending(ending: str) -> None:
    encoding = encode(tiny_tokenizer(), pairs(("a", ""), ("b", "c")), settings(ending=ending))
    assert (len(encoding.examples), encoding.dropped) == (1, 1)


@pytest.mark.parametrize("max_prompt", [0, 5])
def test_loss_on_all_counts_from_the_second_token(max_prompt: int) -> None:
    tokenizer = tiny_tokenizer()
    data = settings(loss_on="all", max_prompt=max_prompt)
    (encoded,) = encode(tokenizer, pairs(("why?", "because")), data).examples
    assert encoded.loss_from == 1
    assert halves(tokenizer, encoded)[1] == "Question: why?\nAnswer: because</s>"


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_running_text_takes_no_template_and_counts_whole(loss_on: str) -> None:
    text = Example("", "once upon a time", "")
    for tokenizer, expected in (
        (tiny_tokenizer(), "<s>once upon a time</s>"),
        (tiny_tokenizer(bos=None, adds=""), "once upon a time</s>"),
    ):
        data = settings(text="body", loss_on=loss_on)
        (encoded,) = encode(tokenizer, [text], data).examples
        assert encoded.loss_from == 1
        assert tokenizer.decode(encoded.ids.tolist()) == expected


def test_a_single_token_has_nothing_to_predict_and_is_dropped() -> None:
    tokenizer = tiny_tokenizer(bos=None, eos=None, adds="")
    encoding = encode(tokenizer, [Example("", "a", "")], settings(text="body"))
    assert (encoding.examples, encoding.dropped) == ([], 1)


def test_the_chat_template_takes_the_place_of_the_template() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    before, counts = one(tokenizer, ("why?", "because"), chat_template=True, ending="!")
    assert before == "<|user|>why?\n<|assistant|>"
    assert counts == "because!</s>"


def test_the_chat_template_gets_the_beginning_of_a_long_prompt() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    text = "0123456789" * 3
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    before, _ = one(tokenizer, (text, "yes"), chat_template=True, max_prompt=4)
    assert before == f"<|user|>{tokenizer.decode(tokens[:4])}\n<|assistant|>"


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(UsageError, match=r"this model's tokenizer has no chat template: take data"):
        encode(tiny_tokenizer(), pairs(("a", "b")), settings(chat_template=True))


TEXTS = st.text(alphabet="ab \n東🌷", max_size=40)


@QUICK
@given(
    st.lists(st.tuples(TEXTS, TEXTS), max_size=8),
    st.integers(8, 70),
    st.integers(0, 30),
    st.sampled_from(["response", "all"]),
)
def test_every_example_is_encoded_within_its_limits_or_counted(
    texts: Sequence[tuple[str, str]], context: int, max_prompt: int, loss_on: str
) -> None:
    tokenizer = tiny_tokenizer()
    data = settings(context=context, max_prompt=max_prompt, loss_on=loss_on, template="{prompt}>")
    encoding: Encoding = encode(tokenizer, pairs(*texts), data)
    assert len(encoding.examples) + encoding.dropped == len(texts)
    end = tokenizer.eos_token_id
    assert sum(example.ids[-1] != end for example in encoding.examples) == encoding.cut
    for example in encoding.examples:
        assert 1 <= example.loss_from < len(example.ids) <= context
        if loss_on == "response":  # bos, prompt, >
            assert example.loss_from <= 1 + (max_prompt or context // 2) + 1
    room = [text for prompt, text in texts if text and context >= 2 * len(prompt.encode()) + 9]
    assert len(encoding.examples) >= len(room)
