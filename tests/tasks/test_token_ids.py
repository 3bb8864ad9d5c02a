"""A long text is tokenized no further than it is needed, and gives the tokens of the whole."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models.base_model import embedded_model_path
from settings.run import DataSettings, run_settings
from tasks.classification import encode_texts
from tasks.conversations import Turn
from tasks.encoding import encode
from tasks.examples import Example
from tasks.token_ids import CHARACTERS, MARGIN, SpecialTokens, enough, tokenize
from tests.adapter_generators import QUICK
from tests.tasks.chat_formats import CHATML_TOKENS, QWEN25, byte_level, sentence_piece
from tools.rehearsal.tiny_models import TEXTS, tiny_tokenizer

MEGABYTES = 15


def word_piece(longest: int = 100) -> Any:
    """BERT's kind: a word of more than so many characters is one unknown token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=longest))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def unigram() -> Any:
    """XLM-R's kind: the likeliest way to cut a text, which is no sequence of merges."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def embedded() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model_path())


TOKENIZERS = [tiny_tokenizer(), sentence_piece(), word_piece(), unigram()]
IDS = ["byte level", "sentencepiece", "wordpiece", "unigram"]
PIECES = st.sampled_from(
    [" ", "\n", "a", "0123456789", "There are apples", "東京", "é", "🌷", "</s>", "  x", "yes" * 50]
)
LONG = st.lists(st.tuples(PIECES, st.integers(1, 900)), min_size=1, max_size=5)


def check_beginning(tokenizer: Any, text: str, count: int) -> None:
    beginning = enough(tokenizer, text, count)
    assert text.startswith(beginning)
    part, whole = (row.ids for row in tokenize(tokenizer, [beginning, text], [(), ()]))
    assert part[:count] == whole[:count]
    assert (len(part) > count) == (len(whole) > count)


@hypothesis_settings(QUICK, max_examples=120)
@given(st.sampled_from(TOKENIZERS), LONG, st.integers(1, 40))
def test_a_beginning_has_the_tokens_of_the_whole(
    tokenizer: Any, pieces: list[tuple[str, int]], count: int
) -> None:
    check_beginning(tokenizer, "".join(piece * times for piece, times in pieces), count)


def test_a_word_in_which_a_beginning_ends_may_become_other_tokens() -> None:
    """Cut, it is as many tokens as it has letters; whole, it is one unknown."""
    text = "x" * 1400 + " " + "y" * 1100 + " a" * 9000
    assert 1400 < CHARACTERS * (10 + MARGIN) < 2500
    check_beginning(word_piece(longest=1000), text, 10)


def test_a_beginning_goes_on_where_one_token_covers_thousands_of_characters() -> None:
    check_beginning(word_piece(), "a " * 9 + "z" * 20_000 + " b" * 900, 10)


@pytest.mark.embedded
def test_a_beginning_has_the_tokens_of_the_whole_in_the_embedded_tokenizer() -> None:
    tokenizer = embedded()
    for text in (" " * 9000 + "x = 1\n" * 3000, "def f(x):\n    return x\n" * 900, "ab" * 9000):
        for count in (1, 50, 300):
            check_beginning(tokenizer, text, count)


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.characters = 0

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.characters += len(texts) if isinstance(texts, str) else sum(map(len, texts))
        return self._tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def data_for(**values: Any) -> DataSettings:
    layer = {f"data.{name.replace('_', '-')}": value for name, value in values.items()}
    return run_settings({"data.path": "mine.jsonl"}, layer).data


HUGE = ("0123456789 the quick brown fox 東京\n" * (MEGABYTES * (1 << 20) // 36)).strip()
BOUND = 40 * CHARACTERS * (192 + MARGIN)


@pytest.mark.parametrize(
    ("example", "values"),
    [
        (Example("why?", HUGE, ""), {}),
        (Example(HUGE, "yes", ""), {}),
        (Example("", HUGE, ""), {"text": "body"}),
        (Example(HUGE, "yes", ""), {"chat_template": True}),
        (Example("", "", "", (Turn("user", "why?"), Turn("assistant", HUGE))), {}),
    ],
    ids=["response", "prompt", "running text", "chat prompt", "conversation"],
)
def test_fifteen_megabytes_are_not_tokenized_whole(example: Example, values: Any) -> None:
    plain = byte_level(*CHATML_TOKENS)
    plain.chat_template = QWEN25
    tokenizer = Counting(plain)
    (encoded,) = encode(tokenizer, [example], data_for(**values)).examples
    assert len(encoded.ids) <= 192
    assert 0 < tokenizer.characters < BOUND < len(HUGE) // 50


def test_fifteen_megabytes_to_classify_are_not_tokenized_whole() -> None:
    tokenizer = Counting(tiny_tokenizer(adds="both"))
    encoding = encode_texts(tokenizer, [Example(HUGE, "a", "")], data_for(), ["a", "b"])
    assert (len(encoding.examples[0].ids), encoding.cut) == (192, 1)
    assert 0 < tokenizer.characters < BOUND


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=IDS)
@QUICK
@given(texts=st.lists(st.text("ab</s>", max_size=30), min_size=1, max_size=4))
def test_no_piece_of_a_split_text_spells_a_special_token(tokenizer: Any, texts: list[str]) -> None:
    special = SpecialTokens(tokenizer)
    words = [word for word in tokenizer.all_special_tokens if len(word) > 1]
    for text in texts:
        cuts = special.cuts(text)
        assert bool(cuts) == special.spelled_in(text) == any(word in text for word in words)
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert "".join(pieces) == text
        assert not any(word in piece for word in words for piece in pieces)
        (tokens,) = tokenize(tokenizer, [text], [cuts], offsets=True)
        ids = set(tokens.ids) - {tokenizer.unk_token_id}
        assert not ids & set(tokenizer.all_special_ids)
        assert not special.stray(text, cuts, tokens.ids)


@QUICK
@given(st.text("ab </s>\n東🌷", max_size=40))
def test_a_split_text_decodes_to_itself_and_knows_its_places(text: str) -> None:
    for tokenizer in (tiny_tokenizer(), byte_level("<|x|>", trims=True), sentence_piece()):
        cuts = SpecialTokens(tokenizer).cuts(text)
        (tokens,) = tokenize(tokenizer, [text], [cuts], offsets=True)
        space = " " if tokenizer in (sentence_piece(),) and text else ""
        assert tokenizer.decode(tokens.ids) == space + text
        covered = "".join(
            text[a:b]
            for a, b in dict.fromkeys(
                map(tuple, tokens.offsets.tolist())
            )  # bytes of a character share it
        )
        assert covered == text


def test_a_special_token_that_comes_out_of_plain_text_drops_the_example() -> None:
    """Wide letters that the normalizer makes into those of the end, which is a piece."""
    tokenizer = unigram()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    wide = "the \uff1c/s\uff1e dog"
    assert tokenizer.eos_token_id in tokenizer(wide)["input_ids"]
    examples = [Example("a", wide, ""), Example(wide, "a", ""), Example("the dog", "a </s> b", "")]
    encoding = encode(tokenizer, examples, data_for())
    assert encoding.counts == {"unsafe": 2, "special-tokens": 1}
    (encoded,) = encoding.examples
    assert encoded.ids.tolist().count(tokenizer.eos_token_id) == 1


def test_a_white_space_token_keeps_its_place_whatever_the_post_processor() -> None:
    text = "a\n\nfoo bar"
    for tokenizer in (byte_level(), byte_level(trims=True)):
        (tokens,) = tokenize(tokenizer, [text], [()], offsets=True)
        assert "".join(text[a:b] for a, b in tokens.offsets) == text
    trimming = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert re.sub(r"\s", "", text) == "".join(text[a:b].strip() for a, b in trimming)
    assert "".join(text[a:b] for a, b in trimming) != text  # and it is as before afterwards
