"""The loss in chunks is the model's own, whatever it does to its logits; few are held at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from client.training import train
from tasks import token_loss
from tasks.encoding import Batch, Encoded, collate
from tasks.token_loss import TokenLoss
from tools.rehearsal.tiny_models import (
    open_format,
    open_model,
    random_adapter,
    random_examples,
    save_llama,
    settings_for,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {"tie_word_embeddings": True}),
    "Gemma2, soft cap": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "Gemma3, soft cap": ("Gemma3Text", {"final_logit_softcapping": 2.0}),
    "Granite, divided": ("Granite", {"logits_scaling": 3.0}),
    "Cohere, scaled": ("Cohere", {"logit_scale": 0.2}),
    "GPT-2": ("GPT2", {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "Qwen3": ("Qwen3", {}),
}


def model_of(kind: str) -> Any:
    name, more = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE, **more)
    name = name.replace("3Text", "3")
    made = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")
    model = made(config).eval()
    model.config.use_cache = False
    return model


def batch_of(vocabulary: int, rows: int = 5, width: int = 40) -> Batch:
    rng = np.random.default_rng(0)
    examples = [
        Encoded(rng.integers(3, vocabulary, width - 3 * row).astype(np.int64), 1 + 4 * row)
        for row in range(rows)
    ]
    return collate(examples, 0, torch.device("cpu"), 64)


@pytest.mark.parametrize("kind", list(KINDS))
def test_in_chunks_it_is_the_models_own_loss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(kind), batch_of(90)
    loss = TokenLoss(model)
    assert loss.in_chunks
    embedding = model.get_input_embeddings().weight
    own = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    wanted = torch.autograd.grad(own * batch.targets, embedding)[0]
    for at_once in (90 * 7, 1, 1 << 24):  # chunks of seven tokens, of one, and all in one piece
        monkeypatch.setattr(token_loss, "LOGITS_AT_ONCE", at_once)
        found = loss(batch)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(own.item() * batch.targets, rel=1e-5)
        gradient = torch.autograd.grad(found, embedding)[0]
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert loss(batch).item() == found.item()


def test_logits_that_depend_on_more_than_one_hidden_state_are_left_to_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Looking(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.cumsum(dim=1)
            return output

    torch.manual_seed(0)
    model = Looking(transformers.LlamaConfig(**SHAPE)).eval()
    monkeypatch.setattr(token_loss, "LOGITS_AT_ONCE", 1)
    loss, batch = TokenLoss(model), batch_of(90)
    assert not loss.in_chunks
    own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    logits = own.logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(
        logits, batch.labels[:, 1:].flatten(), reduction="sum"
    )
    # Without logits_to_keep in its signature, this model is asked for all of them.
    assert loss(batch).item() == pytest.approx(wanted.item(), rel=1e-5)


class Largest(TorchDispatchMode):
    """The most values of any tensor made within this context, and of any in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return made


@pytest.fixture(scope="module")
def many_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary is far larger than its tokenizer: logits dwarf all else."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SHAPE, "vocab_size": 20_000, "tie_word_embeddings": True})
    )
    folder = save_llama(tmp_path_factory.mktemp("many"))
    model.save_pretrained(folder)
    return folder


def test_neither_training_nor_evaluation_holds_the_logits_of_a_whole_batch(
    many_words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "LOGITS_AT_ONCE", 1 << 20)
    tuned = open_model(many_words)
    examples = random_examples(tuned, 16, lengths=(60,))
    whole = sum(len(example.ids) - example.loss_from for example in examples) * 20_000
    assert whole > 8 << 20
    with tuned.adapted(random_adapter(tuned, 2)) as slot:
        assert slot is not None
        parameters = slot.parameters("both")
        with Largest() as training:
            tuned.loss_sum(tuned.batch(examples)).backward()
        assert all(parameter.grad is not None for parameter in parameters)
        with Largest() as evaluation:
            tuned.evaluate(examples, 16 * 64)
    assert training.values <= 1 << 20
    assert evaluation.values <= 1 << 20


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that torch held at once beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


def test_evaluation_needs_at_most_the_memory_of_a_training_step(many_words: Path) -> None:
    tuned = open_model(many_words)
    examples, adapter = random_examples(tuned, 64, lengths=(60,)), random_adapter(tuned, 4)
    run = settings_for(many_words, local__batch_size=4, local__max_steps=1)
    train(tuned, examples[:4], adapter, run.local, seed=0)  # what is made once is there then
    training = peak_bytes(lambda: train(tuned, examples[:4], adapter, run.local, seed=0))

    def evaluation(tokens: int) -> int:
        with tuned.adapted(adapter):
            return peak_bytes(lambda: tuned.evaluate(examples, tokens))

    assert evaluation(run.evaluation_tokens()) <= training
    assert evaluation(32 * 64) > training  # as many examples at a time as it once took


@pytest.mark.parametrize("name", ["bfloat16", "float16", "int8", "nf4"])
def test_in_every_number_format_it_is_the_same_in_chunks(
    name: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = open_format(llama_folder, name)
    examples, adapter = random_examples(tuned, 12), random_adapter(tuned, 3)
    merged = random_adapter(tuned, 2, seed=1)
    whole = tuned.evaluate_global(merged, adapter, examples)
    monkeypatch.setattr(token_loss, "LOGITS_AT_ONCE", 1000)
    found = tuned.evaluate_global(merged, adapter, examples)
    assert found.tokens == whole.tokens
    assert found.loss == pytest.approx(whole.loss, rel=1e-3 if "float" in name else 1e-5)
