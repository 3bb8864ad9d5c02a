"""Chat templates after the public formats of well-known models, shortened, and tokenizers for them.

Each comes with what the loss must be taken on, written down by hand for one conversation.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from tasks.conversations import Turn
from tools.rehearsal.tiny_models import tiny_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{%- set content = message.content %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n')"
    " %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + "
    "content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_LATE_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set system = message['content'] %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + (messages[0]['content'] + '\n\n' if loop.index0 >= messages | length - 2 "
    "and messages[0]['role'] == 'system' else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% endif %}"
    "{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
HARMONY = (  # what the model writes first is a choice of channel
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_TEXT_ALONE = MARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') + '\n' }}" + CHATML

SYSTEM = Turn("system", "Be brief.")
TALK = (
    Turn("user", "How many apples?"),
    Turn("assistant", "There are 3 apples."),
    Turn("user", "Sure?"),
    Turn("assistant", "Grüße 🌷, yes"),
)


@cache
def byte_level(*specials: str, words: tuple[str, ...] = (), trims: bool = False) -> Any:
    """A byte-level tokenizer with these special tokens, and `words` that are tokens of their own.

    trims: its offsets leave white space out, as those of Llama 3 and GPT-2 do.
    """
    tokenizer = tiny_tokenizer("<s>", "</s>", None, adds="")
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in specials])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    if trims:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@cache
def sentence_piece(*specials: str) -> Any:
    """A tokenizer such as Llama 2's: a space before each text, no words, bytes for the rest."""
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    words = ["▁There", "▁are", "▁apples", "▁Sure", "▁yes", "▁How", "▁many"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                merges.append((word[: end - 1], word[end - 1]))
                tokens.append(word[:end])
    vocabulary = {token: at for at, token in enumerate(tokens)}
    bpe = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_tokens([AddedToken(word, special=True, normalized=False) for word in specials])
    return fast


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
HARMONY_TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")


@dataclass(frozen=True)
class Format:
    """A template, its tokenizer, and the text in the loss for each turn of the assistant."""

    name: str
    template: str
    tokenizer: Any
    ends: tuple[str, str]
    """What follows the assistant's text and counts too."""
    begins: tuple[str, str] = ("", "")
    """What comes before it and counts too."""
    system: bool = True


FORMATS = [
    Format("qwen2.5", QWEN25, byte_level(*CHATML_TOKENS), ("<|im_end|>",) * 2),
    Format(
        "qwen3",
        QWEN3,
        byte_level(*CHATML_TOKENS, words=("<think>", "</think>")),
        ("<|im_end|>",) * 2,
        begins=("", "<think>\n\n</think>\n\n"),
    ),
    Format("llama3", LLAMA3, byte_level(*LLAMA3_TOKENS, trims=True), ("<|eot_id|>",) * 2),
    Format(
        "gemma",
        GEMMA,
        byte_level("<start_of_turn>", "<end_of_turn>"),
        ("<end_of_turn>",) * 2,
        system=False,
    ),
    Format("mistral", MISTRAL, byte_level(), ("</s>",) * 2, begins=(" ", " "), system=False),
    Format(
        "mistral, sentencepiece",
        MISTRAL,
        sentence_piece(),
        ("</s>",) * 2,
        begins=(" ", " "),
        system=False,
    ),
    Format(
        "mistral, system with the last question",
        MISTRAL_LATE_SYSTEM,
        byte_level(),
        ("</s>",) * 2,
        begins=(" ", " "),
    ),
    Format("zephyr", ZEPHYR, byte_level(trims=True), ("</s>",) * 2),
    Format("phi3", PHI3, byte_level("<|user|>", "<|assistant|>", "<|end|>"), ("<|end|>",) * 2),
    Format(
        "harmony",
        HARMONY,
        byte_level(*HARMONY_TOKENS),
        ("", "<|return|>"),
        begins=("<|channel|>final<|message|>",) * 2,
    ),
    Format("without a generation prompt", CHATML, byte_level(*CHATML_TOKENS), ("<|im_end|>",) * 2),
    Format("marked", MARKED, byte_level(*CHATML_TOKENS), ("<|im_end|>",) * 2),
    Format(
        "marked, text alone", MARKED_TEXT_ALONE, byte_level(*CHATML_TOKENS), ("<|im_end|>",) * 2
    ),
    Format("plain text", PLAIN, byte_level(), ("", ""), begins=(" ", " ")),
]
