"""A conversation has the ids of its template, and the loss on what the assistant writes alone."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UsageError
from settings.keys import Value
from settings.run import DataSettings, run_settings
from tasks.conversations import Turn, read_turns
from tasks.encoding import IGNORED, Encoded, Encoding, collate, encode
from tasks.examples import Example
from tests.adapter_generators import QUICK
from tests.tasks import chat_formats
from tests.tasks.chat_formats import (
    CHATML,
    CHATML_TOKENS,
    FORMATS,
    GEMMA,
    QWEN3,
    QWEN25,
    SYSTEM,
    TALK,
    Format,
    byte_level,
    sentence_piece,
)
from tools.rehearsal.tiny_models import CHAT_TEMPLATE, tiny_tokenizer

IDS = [form.name for form in FORMATS]


def settings(**values: Value) -> DataSettings:
    layer = {f"data.{name.replace('_', '-')}": value for name, value in values.items()}
    return run_settings({"data.path": "mine.jsonl", "data.context": 4096}, layer).data


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns: Turn) -> Example:
    return Example("", "", "", turns)


def one(tokenizer: Any, turns: Sequence[Turn], **values: Value) -> Encoded:
    """The only example, of which nothing is cut."""
    encoding = encode(tokenizer, [conversation(*turns)], settings(**values))
    assert (len(encoding.examples), encoding.cut, encoding.dropped) == (1, 0, 0)
    return encoding.examples[0]


def in_loss(tokenizer: Any, encoded: Encoded) -> list[str]:
    """What each run of tokens in the loss says, from the labels that training sees."""
    batch = collate([encoded], 0, torch.device("cpu"), longest=1 << 20)
    labels = batch.labels[0].numpy()
    places = np.flatnonzero(labels != IGNORED)
    assert places[0] == encoded.loss_from
    assert (labels[places] == encoded.ids[places]).all()
    assert batch.first_target <= places[0]
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [tokenizer.decode(labels[run].tolist()) for run in runs]


def expected(form: Format) -> list[str]:
    answers = [turn.content for turn in TALK if turn.role == "assistant"]
    return [a + text + b for a, text, b in zip(form.begins, answers, form.ends, strict=True)]


def as_dicts(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


@pytest.mark.parametrize("form", FORMATS, ids=IDS)
def test_the_ids_are_the_templates_and_the_loss_is_the_assistants(form: Format) -> None:
    tokenizer = with_template(form.tokenizer, form.template)
    turns = (SYSTEM, *TALK) if form.system else TALK
    encoded = one(tokenizer, turns)
    whole = tokenizer.apply_chat_template(as_dicts(turns), return_dict=False)
    assert encoded.ids.tolist() == whole
    assert in_loss(tokenizer, encoded) == expected(form)


@pytest.mark.parametrize("form", FORMATS, ids=IDS)
def test_without_special_tokens_at_the_end_the_run_warns(form: Format) -> None:
    tokenizer = with_template(form.tokenizer, form.template)
    encoding = encode(tokenizer, [conversation(*TALK)], settings())
    assert encoding.counts.get("endless", 0) == ("" in form.ends)


@pytest.mark.parametrize("form", FORMATS, ids=IDS)
def test_prompt_and_response_are_a_conversation_of_two_turns(form: Format) -> None:
    tokenizer = with_template(form.tokenizer, form.template)
    talk = encode(tokenizer, [conversation(*TALK[:2])], settings())
    pair = Example(TALK[0].content, TALK[1].content, "")
    same = encode(tokenizer, [pair], settings(chat_template=True))
    (first,), (second,) = talk.examples, same.examples
    assert first.ids.tolist() == second.ids.tolist()
    assert first.spans == second.spans
    assert talk.counts == same.counts


@pytest.mark.parametrize("form", FORMATS, ids=IDS)
def test_the_loss_on_all_is_on_every_token(form: Format) -> None:
    tokenizer = with_template(form.tokenizer, form.template)
    encoded = one(tokenizer, TALK, loss_on="all")
    (text,) = in_loss(tokenizer, encoded)
    assert text == tokenizer.decode(encoded.ids[1:].tolist())


CONTENTS = st.text(alphabet="ab .\n\"'東🌷", min_size=1, max_size=12).filter(str.strip)


@QUICK
@given(st.sampled_from(FORMATS), st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=4))
def test_any_text_is_in_the_loss_and_nothing_of_the_user(
    form: Format, talk: Sequence[tuple[str, str]]
) -> None:
    """Told by characters of their own: what others say holds an X, the assistant's a Y."""
    tokenizer = with_template(form.tokenizer, form.template)
    turns = []
    for question, answer in talk:
        turns += [Turn("user", f"X{question}X"), Turn("assistant", f"Y{answer}Y")]
    encoded = one(tokenizer, turns)
    loss = in_loss(tokenizer, encoded)
    assert len(loss) == len(talk)
    for text, (_, answer) in zip(loss, talk, strict=True):
        assert f"Y{answer}Y" in text
        assert "X" not in text
        assert text.partition(f"Y{answer}Y")[2] in form.ends


def test_a_turn_that_begins_the_conversation_counts_too() -> None:
    tokenizer = with_template(byte_level(*CHATML_TOKENS), QWEN25)
    encoded = one(tokenizer, (Turn("assistant", "Hello!"), *TALK))
    assert in_loss(tokenizer, encoded)[0] == "Hello!<|im_end|>"


def test_a_header_that_no_generation_prompt_writes_does_not_count() -> None:
    template = QWEN25.replace(
        "{%- if add_generation_prompt %}",
        "{%- if add_generation_prompt and messages[-1].role == 'user' %}",
    )
    assert template != QWEN25
    tokenizer = with_template(byte_level(*CHATML_TOKENS), template)
    encoded = one(tokenizer, (SYSTEM, Turn("assistant", "Hello!"), *TALK))
    assert in_loss(tokenizer, encoded)[0] == "Hello!<|im_end|>"


def test_a_token_that_is_not_the_assistants_alone_does_not_count() -> None:
    """`▁There` begins with the template's space, `▁apples` ends with the template's word."""
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + 'apples ' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = with_template(sentence_piece(), template)
    encoded = one(tokenizer, (TALK[0], Turn("assistant", "There are yes "), *TALK[:2]))
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids.tolist())
    assert {"▁There", "▁apples"} <= set(tokens)
    (start, end), _ = encoded.spans
    assert tokens[start:end] == ["▁are", "▁yes"]


def test_a_long_conversation_loses_its_end_and_is_counted() -> None:
    tokenizer = with_template(byte_level(*CHATML_TOKENS), QWEN25)
    whole = one(tokenizer, TALK)
    for context in range(8, len(whole.ids) + 2):
        encoding = encode(tokenizer, [conversation(*TALK)], settings(context=context))
        room = whole.loss_from < context
        assert len(encoding.examples) == room
        assert encoding.counts.get("no-room", 0) == (not room)
        if room:
            (encoded,) = encoding.examples
            assert encoding.cut == (context < len(whole.ids))
            assert encoded.ids.tolist() == whole.ids.tolist()[:context]
            assert encoded.spans[0][0] == whole.loss_from
            assert encoded.spans[-1][1] <= context


def test_max_prompt_does_not_cut_into_a_conversation() -> None:
    tokenizer = with_template(byte_level(*CHATML_TOKENS), QWEN25)
    assert one(tokenizer, TALK, max_prompt=2).ids.tolist() == one(tokenizer, TALK).ids.tolist()


def test_what_has_nothing_to_learn_is_dropped_under_its_own_name() -> None:
    tokenizer = with_template(byte_level(*CHATML_TOKENS), QWEN25)
    examples = [
        conversation(Turn("user", "Hello?")),
        conversation(Turn("user", "Hello?"), Turn("assistant", " \n")),
        conversation(*TALK),
        Example("", "", ""),
    ]
    encoding = encode(tokenizer, examples, settings())
    assert len(encoding.examples) == 1
    assert encoding.counts == {"no-assistant": 1, "empty": 2}
    assert encoding.dropped == 3


def test_an_empty_answer_among_others_is_not_learned() -> None:
    tokenizer = with_template(byte_level(*CHATML_TOKENS), QWEN25)
    encoded = one(tokenizer, (TALK[0], Turn("assistant", ""), *TALK[2:]))
    assert in_loss(tokenizer, encoded) == ["Grüße 🌷, yes<|im_end|>"]


def test_reasoning_that_the_template_keeps_counts_and_what_it_drops_is_counted() -> None:
    tokenizer = with_template(byte_level(*CHATML_TOKENS, words=("<think>", "</think>")), QWEN3)
    thought = Turn("assistant", "<think>\nTwo and one\n</think>\n\n3")
    (kept,) = encode(tokenizer, [conversation(TALK[0], thought)], settings()).examples
    assert in_loss(tokenizer, kept) == ["<think>\nTwo and one\n</think>\n\n3<|im_end|>"]
    encoding = encode(tokenizer, [conversation(TALK[0], thought, *TALK[2:])], settings())
    assert encoding.counts == {"rewritten": 1}
    assert in_loss(tokenizer, encoding.examples[0]) == [
        "3<|im_end|>",
        "<think>\n\n</think>\n\nGrüße 🌷, yes<|im_end|>",
    ]


@pytest.mark.parametrize("form", FORMATS, ids=IDS)
@pytest.mark.parametrize("who", [0, 1])
def test_no_text_can_close_a_turn(form: Format, who: int) -> None:
    tokenizer = with_template(form.tokenizer, form.template)
    clean = one(tokenizer, TALK)
    bad = [token for token in tokenizer.get_added_vocab() if "think" not in token]
    attack = "a " + " b".join(bad) + bad[0] + bad[-1] + " c"
    turns = [turn if at != who else Turn(turn.role, attack) for at, turn in enumerate(TALK)]
    encoding = encode(tokenizer, [conversation(*turns)], settings())
    (encoded,) = encoding.examples
    assert encoding.counts["special-tokens"] == 1
    specials = tokenizer.all_special_ids + list(tokenizer.get_added_vocab().values())
    closing = [[i for i in e.ids.tolist() if i in specials] for e in (clean, encoded)]
    assert closing[0] == closing[1]  # as many, in the same order, as without the attack
    text = tokenizer.decode(clean.ids.tolist()).replace(TALK[who].content, attack)
    assert tokenizer.decode(encoded.ids.tolist()) == text
    if who == 1:
        assert attack in in_loss(tokenizer, encoded)[0]


def test_the_two_layouts_of_one_conversation_are_the_same_example() -> None:
    messages = as_dicts((SYSTEM, *TALK))
    one_list = read_turns({"messages": [dict(m) for m in messages]}, ("messages",), "a, row 1")
    row = {"prompt": [dict(m) for m in messages[:-1]], "completion": [dict(messages[-1])]}
    two_lists = read_turns(row, ("prompt", "completion"), "b, row 1")
    tokenizer = with_template(byte_level(*CHATML_TOKENS), QWEN25)
    first, second = one(tokenizer, one_list), one(tokenizer, two_lists)
    assert first.ids.tolist() == second.ids.tolist()
    assert first.spans == second.spans


def test_todays_date_does_not_enter_what_is_trained_on() -> None:
    tokenizer = with_template(byte_level(*CHATML_TOKENS), chat_formats.DATED)
    text = tokenizer.decode(one(tokenizer, TALK).ids.tolist())
    assert text.startswith("26 Jul 2024\n<|im_start|>user\n")


def test_a_template_that_a_file_brings_takes_the_place_of_the_tokenizers_own(
    tmp_path: Path,
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML, encoding="utf-8")
    tokenizer = with_template(byte_level(*CHATML_TOKENS), GEMMA)
    encoded = one(tokenizer, (SYSTEM, *TALK), chat_template_file=str(file))
    assert tokenizer.decode(encoded.ids.tolist()).startswith("<|im_start|>system\nBe brief.")
    pair = encode(tokenizer, [Example("a", "b", "")], settings(chat_template_file=str(file)))
    assert tokenizer.decode(pair.examples[0].ids.tolist()).startswith("<|im_start|>user\na")


def refused(tokenizer: Any, turns: Sequence[Turn] = TALK, **values: Value) -> str:
    with pytest.raises(UsageError) as caught:
        encode(tokenizer, [conversation(*turns)], settings(**values))
    return str(caught.value)


def test_a_tokenizer_without_a_template_names_the_key_that_brings_one() -> None:
    assert refused(tiny_tokenizer()) == (
        "this model's tokenizer has no chat template: name a file with one (Jinja) in "
        "data.chat-template-file; a file with prompt and response needs none: data.template "
        "formats it"
    )


def test_a_file_that_is_no_template_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    missing = tmp_path / "missing.jinja"
    assert refused(tokenizer, chat_template_file=str(missing)) == (
        f"data.chat-template-file names {str(missing)!r}, which cannot be read: No such file or "
        "directory"
    )
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for message in messages %}\n{{ message }", encoding="utf-8")
    assert re.fullmatch(
        rf"the chat template in {re.escape(str(broken))} is no Jinja template: .+ \(line 2\)",
        refused(tokenizer, chat_template_file=str(broken)),
    )
    broken.write_bytes(b"\xff\xfe\x00")
    assert refused(tokenizer, chat_template_file=str(broken)).endswith(
        "which cannot be read: it is not UTF-8 text"
    )


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    tokenizer = with_template(byte_level("<start_of_turn>", "<end_of_turn>"), GEMMA)
    assert refused(tokenizer, (SYSTEM, *TALK)) == (
        "this model's chat template refuses a conversation that begins 'Be brief.', with the roles "
        "system, user, assistant, user, assistant: System role not supported. Leave such "
        "conversations out, or name a template that takes them in data.chat-template-file"
    )


def test_a_template_that_hides_the_assistant_is_refused_and_never_guessed() -> None:
    twice = "{% for message in messages %}{{ message['content'] * 2 + '\n' }}{% endfor %}"
    counts = "{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}"
    for template in (twice, counts + "{{ messages[1]['content'] | length }}"):
        message = refused(with_template(tiny_tokenizer(), template))
        assert message.startswith("this model's chat template changes more than the place of a tu")
        assert "mark what it writes with {% generation %}" in message


def test_a_turn_that_the_template_leaves_out_is_counted() -> None:
    template = CHATML.replace("{% for message in messages %}", "{% for message in messages[-2:] %}")
    tokenizer = with_template(byte_level(*CHATML_TOKENS), template)
    encoding = encode(tokenizer, [conversation(*TALK)], settings())
    assert encoding.counts == {"rewritten": 1}
    assert in_loss(tokenizer, encoding.examples[0]) == ["Grüße 🌷, yes<|im_end|>"]
    alone = encode(tokenizer, [conversation(*TALK[:2], TALK[2], TALK[2])], settings())
    assert (alone.examples, alone.counts) == ([], {"no-assistant": 1})


def test_the_fields_of_a_template_are_the_users_turn() -> None:
    tokenizer = with_template(tiny_tokenizer(), CHAT_TEMPLATE)
    examples = [
        Example("", "4", "", fields=(("instruction", "Add."), ("input", "2 + 2"))),
        Example("", "4", "", fields=(("instruction", "Add 2 and 2."), ("input", ""))),
    ]
    data = settings(chat_template=True, template="alpaca")
    encoding: Encoding = encode(tokenizer, examples, data)
    texts = [tokenizer.decode(example.ids.tolist()) for example in encoding.examples]
    assert texts == [
        "<|user|>Add.\n\n2 + 2\n<|assistant|>4\n",
        "<|user|>Add 2 and 2.\n<|assistant|>4\n",
    ]
