"""Token ids decode back to template, prompt, response and ending, cut where the context ends."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UsageError
from settings.keys import Value
from settings.run import DataSettings, run_settings
from tasks.conversations import Turn
from tasks.encoding import TOGETHER, Encoded, Encoding, encode, share
from tasks.examples import Example
from tests.adapter_generators import QUICK
from tools.rehearsal.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

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


def test_the_chat_template_takes_the_place_of_the_template_and_ends_as_it_ends() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    data = settings(chat_template=True, ending="!")
    encoding = encode(tokenizer, pairs(("why?", "because")), data)
    (encoded,) = encoding.examples
    assert tokenizer.decode(encoded.ids.tolist()) == "<|user|>why?\n<|assistant|>because!\n"
    ((start, end),) = encoded.spans
    assert tokenizer.decode(encoded.ids[start:end].tolist()) == "because!"
    assert encoding.counts == {"endless": 1}


@pytest.mark.parametrize("limit", [1, 4])
def test_the_chat_template_gets_the_beginning_of_a_long_prompt(limit: int) -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    text = "0123456789" * 3
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    data = settings(chat_template=True, max_prompt=limit, context=40)
    encoding = encode(tokenizer, pairs((text, "yes")), data)
    (encoded,) = encoding.examples
    before, _ = halves(tokenizer, encoded)
    kept = tokens[:limit]
    assert before == f"<|user|>{tokenizer.decode(kept)}\n<|assistant|>"
    assert encoding.counts["shortened-prompt"] == 1


def test_a_prompt_is_not_cut_within_a_character() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    data = settings(chat_template=True, max_prompt=2)
    (encoded,) = encode(tokenizer, pairs(("a🌷", "yes")), data).examples
    assert halves(tokenizer, encoded)[0] == "<|user|>a\n<|assistant|>"


ALPACA = [
    Example("", "Köln", "", fields=(("instruction", "Which city?"), ("input", "On the Rhine"))),
    Example("", "blue", "", fields=(("instruction", "Which colour?"), ("input", " "))),
]


def test_a_template_takes_any_field() -> None:
    tokenizer = tiny_tokenizer()
    example = Example("why", "because", "", fields=(("input", "{prompt}"),))
    template = "{{Q}}: {prompt}?\n{input}\n{prompt}!"
    (encoded,) = encode(tokenizer, [example], settings(template=template)).examples
    assert halves(tokenizer, encoded) == ("<s>{Q}: why?\n{prompt}\nwhy!", "because</s>")


def test_the_alpaca_preset_leaves_an_empty_input_out() -> None:
    tokenizer = tiny_tokenizer()
    data = settings(template="alpaca", context=600)
    assert data.response == "output"
    texts = [halves(tokenizer, encoded) for encoded in encode(tokenizer, ALPACA, data).examples]
    assert texts == [
        (
            "<s>Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nWhich city?\n\n### Input:\nOn the Rhine\n\n### Response:\n",
            "Köln</s>",
        ),
        (
            "<s>Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nWhich colour?\n\n### Response:\n",
            "blue</s>",
        ),
    ]


def test_the_longest_field_loses_first_and_the_templates_own_text_stays() -> None:
    tokenizer = tiny_tokenizer()
    fields = (("short", "0123"), ("long", "0123456789" * 3))
    example = Example("", "yes", "", fields=fields)
    counted = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for _, text in fields]
    limit = counted[0] + 5
    data = settings(template="a {short} b {long} c", max_prompt=limit)
    encoding = encode(tokenizer, [example], data)
    cut = tokenizer.decode(tokenizer(fields[1][1], add_special_tokens=False)["input_ids"][:5])
    assert halves(tokenizer, encoding.examples[0]) == (f"<s>a 0123 b {cut} c", "yes</s>")
    assert encoding.counts == {"shortened-prompt": 1}


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 60))
def test_a_limit_is_shared_so_that_the_longest_lose_first(lengths: list[int], limit: int) -> None:
    kept = share(lengths, limit)
    assert sum(kept) == min(limit, sum(lengths))
    assert all(0 <= k <= n for k, n in zip(kept, lengths, strict=True))
    shortened = [k for k, n in zip(kept, lengths, strict=True) if k < n]
    assert not shortened or max(kept) - min(shortened) <= 1


def test_a_field_that_the_data_lack_is_named() -> None:
    expected = r"names \{question\}, and the data have no such field; they have \{prompt\}"
    with pytest.raises(UsageError, match=expected):
        encode(tiny_tokenizer(), pairs(("a", "b")), settings(template="{question}"))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (settings(), "<s>Question: a </s> b\nAnswer: <pad></s>c</s>"),
        (settings(ending="</s><pad>"), "<s>Question: a </s> b\nAnswer: <pad></s>c</s><pad></s>"),
        (settings(template="<pad>{prompt}</s>"), "<s><pad>a </s> b</s><pad></s>c</s>"),
    ],
)
def test_what_looks_like_a_special_token_in_the_data_is_text(data: DataSettings, text: str) -> None:
    tokenizer = tiny_tokenizer()
    encoding = encode(tokenizer, pairs(("a </s> b", "<pad></s>c"), ("a b", "c")), data)
    encoded, clean = encoding.examples
    assert tokenizer.decode(encoded.ids.tolist()) == text
    assert encoding.counts == {"special-tokens": 1}
    special = [
        [i for i in e.ids.tolist() if i in tokenizer.all_special_ids] for e in (encoded, clean)
    ]
    assert special[0] == special[1]


def test_running_text_trains_on_the_special_tokens_that_it_spells_and_they_are_counted() -> None:
    tokenizer = tiny_tokenizer()
    texts = [Example("", "one</s>two", ""), Example("", "three", "")]
    encoding = encode(tokenizer, texts, settings(text="body"))
    assert encoding.examples[0].ids.tolist().count(tokenizer.eos_token_id) == 2
    assert encoding.counts == {"special-tokens-in-text": 1}


def test_a_tokenizer_without_end_of_text_is_counted() -> None:
    tokenizer = tiny_tokenizer(bos=None, eos=None, adds="")
    encoding = encode(tokenizer, pairs(("a", "b"), ("a", ""), ("a", "b" * 300)), settings())
    assert encoding.counts == {"endless": 1, "empty": 1, "cut": 1}


def test_each_reason_is_counted_under_its_own_name() -> None:
    tokenizer = tiny_tokenizer()
    examples = pairs(("a", ""), ("a", "b"), ("a", "b" * 90), ("a" * 60, "b"))
    counts = encode(tokenizer, examples, settings(context=40, max_prompt=4)).counts
    assert counts == {"empty": 1, "cut": 1, "shortened-prompt": 1}
    assert encode(tokenizer, examples, settings(context=8)).counts == {"empty": 1, "no-room": 3}


def test_many_examples_of_both_kinds_stay_in_their_order() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    examples = []
    for number in range(TOGETHER + 200):
        turns = (Turn("user", "n"), Turn("assistant", f"{number}")) if number % 3 else ()
        examples.append(Example("n", f"{number}" if number % 7 else "", "", turns))
    encoding = encode(tokenizer, examples, settings())
    kept = [number for number in range(len(examples)) if number % 3 or number % 7]
    assert encoding.counts["empty"] == len(examples) - len(kept)
    texts = [tokenizer.decode(encoded.ids.tolist()) for encoded in encoding.examples]
    assert [int(re.findall(r"\d+", text)[-1]) for text in texts] == kept


def test_a_tokenizer_that_knows_no_places_encodes_pairs_and_refuses_conversations() -> None:
    tokenizer = transformers.ByT5Tokenizer()
    assert one(tokenizer, ("why?", "because")) == ("Question: why?\nAnswer: ", "because</s>")
    talk = Example("", "", "", (Turn("user", "a"), Turn("assistant", "b")))
    with pytest.raises(
        UsageError, match=r"need a tokenizer that knows where its tokens lie in the"
    ):
        encode(tokenizer, [talk], settings())


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
