"""Pretrain the small base model that Bouquet's tests and demonstrations fine-tune.

    python -m tools.pretrain --minutes 40                  # this long, whatever the machine
    python -m tools.pretrain --steps 100 --output small    # this number of steps, however long

Reads the running Python's standard library with every docstring cut out, trains a byte-level BPE
tokenizer on it, then a Llama of 3.8 M parameters, and writes both as one model folder that
`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` open offline, beside a
`training_log.json` with every setting and the loss curve. The folder appears only when complete.
With --steps, the same Python and torch versions and the same thread count repeat the same run.

Where the machine does other work too, set OMP_WAIT_POLICY=passive: beside one busy process, threads
that spin while they wait for one another made a step three to thirteen times slower.
"""

import argparse
import json
import math
import platform
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks.standard_library import read_sources

ROOT = Path(__file__).resolve().parent.parent

END, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 4096
CONTEXT = 512
HELD_OUT_FRACTION = 0.02  # of the modules
# One pattern per pre-token: a word with the one sign or space before it, up to three digits, signs,
# and runs of white space, which leave their last space to the word behind: an indent is one token.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the sources, with their comments counted four times for better English."""
    comments = ["\n".join(re.findall(r"^\s*# ?(.*)$", text, re.MULTILINE)) for text in texts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],  # ids 0 and 1
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + 3 * comments, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model() -> LlamaForCausalLM:
    """A Llama with 3.8 M random parameters: 7.6 MB in 16 bits."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            # The usual 0.02 suits a width of some thousands; at 256 it loses the first 100 steps.
            initializer_range=0.05,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts as one stream of token ids, each text between two END tokens."""
    ids = [0]
    for encoded in tokenizer(texts, verbose=False)["input_ids"]:
        ids += [*encoded, 0]
    return torch.tensor(ids)


def loss_of(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean nats per token of windows (batch, CONTEXT + 1), in bfloat16 where that is safe."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validate(model: torch.nn.Module, stream: torch.Tensor) -> float:
    """Mean nats per token over the whole stream, in windows of CONTEXT."""
    model.eval()
    windows = stream[: (len(stream) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    total = 0.0
    for batch in torch.split(windows, 4):
        total += loss_of(model, batch).item() * len(batch)
    model.train()
    return total / len(windows)


def optimizer_for(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the gains of the norms alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    gains = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def schedule(progress: float, warmup: float = 0.03, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to floor; progress in 0..1."""
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def windows_for_ever(stream: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Windows (CONTEXT + 1,) of the stream in random order; each epoch cuts at another offset."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(CONTEXT, (), generator=generator))
        windows = stream[offset:].unfold(0, CONTEXT + 1, CONTEXT)
        for i in torch.randperm(len(windows), generator=generator).tolist():
            yield windows[i]


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace
) -> dict[str, object]:
    """Train the model in place; returns what the log says of it."""
    optimizer = optimizer_for(model, args)
    windows = windows_for_ever(stream, args.seed)
    curve: list[dict[str, float]] = [{"step": 0, "validation": validate(model, held_out)}]
    step, progress, losses, start = 0, 0.0, [], time.monotonic()
    while progress < 1:
        factor = schedule(progress)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor
        losses.append(0.0)
        for _ in range(args.batch // args.micro_batch):
            loss = loss_of(model, torch.stack([next(windows) for _ in range(args.micro_batch)]))
            (loss * args.micro_batch / args.batch).backward()
            losses[-1] += loss.item() * args.micro_batch / args.batch
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        seconds = time.monotonic() - start
        # By the clock, not by a number of steps planned from it: other work on the machine may slow
        # the run at any time, and the learning rate still comes down before the time is up.
        progress = step / args.steps if args.steps else seconds / (60 * args.minutes)
        if step % args.log_every == 0 or progress >= 1:
            row = {"step": step, "seconds": seconds, "rate": args.learning_rate * factor}
            row |= {"train": sum(losses) / len(losses), "validation": validate(model, held_out)}
            curve.append(row)
            losses = []
            print(json.dumps(rounded(row)), flush=True)
    return {
        "steps": step,
        "tokens": step * args.batch * CONTEXT,
        "epochs": step * args.batch * CONTEXT / len(stream),
        "seconds": time.monotonic() - start,
        "curve": curve,
    }


def rounded(value: object) -> object:
    """The same value with every float at five significant digits, for a log that people read."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def save(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    log: dict[str, object],
) -> None:
    """Write the model folder beside its place and swap it in; other files there (a card) stay."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # float16, not bfloat16: the weights lie far inside its range, and it rounds 8 times finer.
    model.half().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    # Stored in 16 bits, but float32 once loaded: CPUs compute slowly and badly in float16.
    config = json.loads((partial / "config.json").read_text())
    config["dtype"] = "float32"
    (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (partial / "training_log.json").write_text(json.dumps(rounded(log), indent=1) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        file.replace(folder / file.name)
    partial.rmdir()


def parse_arguments() -> argparse.Namespace:
    """The settings of the run, every one of which goes into the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "tasks" / "stdlib_lm")
    parser.add_argument("--minutes", type=float, default=40.0, help="time to train for")
    parser.add_argument("--steps", type=int, help="number of steps; then --minutes does not count")
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens a step")
    parser.add_argument("--micro-batch", type=int, default=4, help="of these, at once in memory")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its peak")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=100, help="steps")
    return parser.parse_args()


def main() -> None:
    """Read, tokenize, train, save."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    # The character tables of the codecs are numbers in a row: 14 % of the text, nothing to learn.
    modules = [(name, text) for name, text in read_sources() if not name.startswith("encodings.")]
    random.Random(args.seed).shuffle(modules)
    held_out = modules[: round(HELD_OUT_FRACTION * len(modules))]
    kept = modules[len(held_out) :]
    tokenizer = train_tokenizer([text for _, text in kept])
    stream = pack([text for _, text in kept], tokenizer)
    validation = pack([text for _, text in held_out], tokenizer)
    model = new_model()
    log: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": {"modules": len(kept), "tokens": len(stream)},
        "validation": {
            "modules": [name for name, _ in held_out],
            "tokens": len(validation),
            "bytes": sum(len(text.encode()) for _, text in held_out),
        },
    }
    print(json.dumps(log), flush=True)
    log |= train(model, stream, validation, args)
    save(args.output, model, tokenizer, log)


if __name__ == "__main__":
    main()
