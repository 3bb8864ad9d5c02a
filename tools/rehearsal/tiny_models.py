"""Tiny random models on disk, each with a tokenizer trained on the spot: nothing is downloaded.

A folder is what `model.path` names. Weights are drawn large enough that every layer matters to the
loss: with the usual 0.02 a tiny model computes nearly the same whatever its layers hold.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from adapters.adapter import Adapter, Factors, FloatArray
from models.tuned_model import TunedModel
from settings.keys import Value
from settings.run import ModelSettings, RunSettings, run_settings
from tasks.encoding import Encoded

CONTEXT = 64
FORMATS = {
    "float32": ("float32", "none"),
    "bfloat16": ("bfloat16", "none"),
    "float16": ("float16", "none"),
    "int8": ("float32", "int8"),
    "nf4": ("float32", "nf4"),
}
"""Number formats of a base: name -> (model.dtype, model.quantization)."""
SPREAD = 0.3
ROUGH = {"initializer_range": SPREAD}
TEXTS = [
    "def add(a, b): return a + b",
    "Return the sum of two numbers and nothing else.",
    "the quick brown fox jumps over the lazy dog; 0123456789",
    "Grüße aus Köln, naïve café: 東京 🌷",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def _trained(specials: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    adds: str = "bos",
    chat_template: str | None = None,
) -> Any:
    """A byte-level tokenizer, which gives back any text; `adds` names what it puts around it."""
    specials = tuple(dict.fromkeys(token for token in (bos, eos, pad) if token))
    tokenizer = Tokenizer.from_str(_trained(specials))
    around = {"bos": f"{bos} $A", "eos": f"$A {eos}", "both": f"{bos} $A {eos}", "": "$A"}[adds]
    pairs = [(token, tokenizer.token_to_id(token)) for token in specials]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=pairs)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    )
    fast.chat_template = chat_template
    return fast


def save_llama(folder: Path, seed: int = 0, dtype: str = "float32", **config: Any) -> Path:
    """A LlamaForCausalLM of two layers, q (24, 24), k and v (12, 24), gate and up (40, 24)."""
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    shape = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        **ROUGH,
        **config,
    }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(tokenizer), **shape)
    )
    return _save(model.to(getattr(torch, dtype)), tokenizer, folder)


def save_gpt2(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A GPT2LMHeadModel of two layers: its linear layers are Conv1D, with weights (n, m).

    Its tokenizer is GPT-2's in kind: one special token, put nowhere, and none for padding.
    """
    tokenizer = tiny_tokenizer("<|end|>", "<|end|>", None, adds="")
    shape = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, **ROUGH, **config}
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **shape,
        )
    )
    return _save(model, tokenizer, folder)


def save_bert(folder: Path, seed: int = 0, kind: str = "BertModel", **config: Any) -> Path:
    """A BertModel, which is no causal language model, or another model over the same body.

    Of two layers, query, key, value and output (16, 16), intermediate (20, 16).
    """
    tokenizer = tiny_tokenizer(adds="both")
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": tokenizer.pad_token_id,
        **ROUGH,
        **config,
    }
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(transformers.BertConfig(vocab_size=len(tokenizer), **shape))
    return _save(model, tokenizer, folder)


def save_roberta(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A RobertaForSequenceClassification whose positions count from behind the padding's, 1."""
    tokenizer = tiny_tokenizer(adds="both")
    tokenizer.model_max_length = CONTEXT + 2  # as some are saved: more than the model takes
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": CONTEXT + 2,
        "pad_token_id": 1,
        **ROUGH,
        **config,
    }
    torch.manual_seed(seed)
    model = transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(vocab_size=len(tokenizer), **shape)
    )
    return _save(model, tokenizer, folder)


def save_mixtral(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A MixtralForCausalLM of two layers and three experts: gate and up (40, 24), down (24, 20)."""
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    shape = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "max_position_embeddings": CONTEXT,
        **ROUGH,
        **config,
    }
    torch.manual_seed(seed)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(vocab_size=len(tokenizer), **shape)
    )
    return _save(model, tokenizer, folder)


def save_gpt_oss(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A GptOssForCausalLM: its experts' matrices are (n, m), with biases beside them."""
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    shape = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **ROUGH,
        **config,
    }
    torch.manual_seed(seed)
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(vocab_size=len(tokenizer), **shape)
    )
    return _save(model, tokenizer, folder)


def save_gemma3(folder: Path, seed: int = 0, dtype: str = "float32") -> Path:
    """A Gemma3ForConditionalGeneration: a text model of two layers beside a vision tower of one."""
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "sliding_window": 16,
        **ROUGH,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    torch.manual_seed(seed)
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    )
    return _save(model.to(getattr(torch, dtype)), tokenizer, folder)


def save_mamba(folder: Path, seed: int = 0) -> Path:
    """A MambaForCausalLM, of whose linear layers PEFT refuses out_proj."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4
        )
    )
    return _save(model, tokenizer, folder)


def _save(model: Any, tokenizer: Any, folder: Path) -> Path:
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def open_model(
    folder: Path,
    targets: str = "all-linear",
    dtype: str = "float32",
    labels: Sequence[str] = (),
    parameters: Sequence[str] = (),
    quantization: str = "none",
) -> TunedModel:
    """A TunedModel of its own, apart from the resident one of the process."""
    settings = model_settings(folder, dtype, "cpu", quantization)
    return TunedModel(settings, targets, labels, parameters)


def model_settings(
    folder: Path, dtype: str = "float32", device: str = "cpu", quantization: str = "none"
) -> ModelSettings:
    """The [model] section for this folder."""
    layer: dict[str, Value] = {
        "model.path": str(folder),
        "model.dtype": dtype,
        "model.device": device,
        "model.quantization": quantization,
    }
    return run_settings(layer).model


def settings_for(folder: Path, **values: Value) -> RunSettings:
    """Run settings on this model, on the CPU in float32; `local__epochs=2` sets local.epochs."""
    layer = {name.replace("__", ".").replace("_", "-"): value for name, value in values.items()}
    pinned: dict[str, Value] = {
        "model.path": str(folder),
        "model.device": "cpu",
        "local.precision": "float32",
        "local.max-steps": 0,
        "data.context": CONTEXT,
    }
    return run_settings(pinned, layer)


def open_format(folder: Path, name: str) -> TunedModel:
    """The model with its base in one of FORMATS."""
    dtype, quantization = FORMATS[name]
    return open_model(folder, dtype=dtype, quantization=quantization)


def random_adapter(tuned: TunedModel, rank: int, seed: int = 0, size: float = 1.0) -> Adapter:
    """Factors of one rank on every module, B included, and a scale that is not 1."""
    rng = np.random.default_rng(seed)
    return Adapter(
        {
            name: Factors(
                rng.standard_normal((rank, n)).astype(np.float32),
                rng.standard_normal((m, rank)).astype(np.float32),
                0.05 * size,
            )
            for name, (m, n) in tuned.shapes.items()
        }
    )


def random_examples(
    tuned: TunedModel, count: int, seed: int = 0, lengths: Sequence[int] = (6, 9, 13, 20)
) -> list[Encoded]:
    """Encoded examples of mixed length, whose loss begins at different places."""
    rng = np.random.default_rng(seed)
    vocabulary = len(tuned.base.tokenizer)
    examples = []
    for index in range(count):
        length = lengths[index % len(lengths)]
        ids = rng.integers(3, vocabulary, length).astype(np.int64)
        examples.append(Encoded(ids, loss_from=1 + index % (length - 2)))
    return examples


def random_head(tuned: TunedModel, seed: int = 0) -> dict[str, FloatArray]:
    """A head large enough to decide, biases included."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape, dtype=np.float32)
        for name, shape in tuned.head_shapes.items()
    }


def random_texts(
    tuned: TunedModel, count: int, seed: int = 0, lengths: Sequence[int] = (6, 9, 13, 40)
) -> list[Encoded]:
    """Encoded texts of mixed length, each of a random class."""
    rng = np.random.default_rng(seed)
    vocabulary = len(tuned.base.tokenizer)
    texts = []
    for index in range(count):
        length = lengths[index % len(lengths)]
        ids = rng.integers(3, vocabulary, length).astype(np.int64)
        texts.append(Encoded(ids, length, label=int(rng.integers(len(tuned.labels)))))
    return texts
