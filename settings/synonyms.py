"""What other programs call a key of this configuration.

Left: the key in lower case with hyphens, as a person may type it: whole (`data.output`), or its
last part alone (`lr`), which stands for that part below any section or none. Right: the key that
is meant, or `key=value` where a value of it says the same.
"""

from collections.abc import Collection

SYNONYMS = {
    # the run
    "num-rounds": "rounds",
    "n-rounds": "rounds",
    "num-server-rounds": "rounds",
    "server-rounds": "rounds",
    "random-seed": "seed",
    "random-state": "seed",
    "output-dir": "output",
    "out": "output",
    "resume-from-checkpoint": "resume",
    "task-type": "task",
    # strategy and clients
    "strategy": "strategy.name",
    "method": "strategy.name",
    "algorithm": "strategy.name",
    "aggregation": "strategy.name",
    "clients": "clients.count",
    "num-clients": "clients.count",
    "n-clients": "clients.count",
    "num-partitions": "clients.count",
    "num-supernodes": "clients.count",
    "clients.number": "clients.count",
    "fraction-fit": "clients.fraction",
    "fraction-train": "clients.fraction",
    "client-fraction": "clients.fraction",
    "min-fit-clients": "clients.min-replies",
    "min-train-nodes": "clients.min-replies",
    "min-clients": "clients.min-replies",
    "timeout": "clients.timeout-seconds",
    "round-timeout": "clients.timeout-seconds",
    # model
    "model": "model.path",
    "model-name": "model.path",
    "model-name-or-path": "model.path",
    "model.name": "model.path",
    "model-id": "model.path",
    "base-model": "model.path",
    "torch-dtype": "model.dtype",
    "load-in-4bit": "model.quantization=nf4",
    "load-in-8bit": "model.quantization=int8",
    "4bit": "model.quantization=nf4",
    "8bit": "model.quantization=int8",
    # data
    "data": "data.path",
    "dataset": "data.path",
    "dataset-path": "data.path",
    "data-path": "data.path",
    "train-file": "data.path",
    "data.file": "data.path",
    "data.files": "data.path",
    "data.train": "data.path",
    "eval-data": "data.evaluation",
    "eval-file": "data.evaluation",
    "eval-path": "data.evaluation",
    "validation-file": "data.evaluation",
    "test-file": "data.evaluation",
    "data.eval": "data.evaluation",
    "data.test": "data.evaluation",
    "data.validation": "data.evaluation",
    "eval-split": "data.held-out",
    "test-size": "data.held-out",
    "val-set-size": "data.held-out",
    "validation-split": "data.held-out",
    "max-length": "data.context",
    "max-seq-length": "data.context",
    "max-seq-len": "data.context",
    "max-len": "data.context",
    "seq-len": "data.context",
    "sequence-len": "data.context",
    "sequence-length": "data.context",
    "cutoff-len": "data.context",
    "block-size": "data.context",
    "context-length": "data.context",
    "max-prompt-length": "data.max-prompt",
    "max-samples": "data.max-examples",
    "max-train-samples": "data.max-examples",
    "data.alpha": "data.dirichlet-alpha",
    "partition.alpha": "data.dirichlet-alpha",
    "partition-by": "data.field",
    "instruction": "data.prompt",
    "question": "data.prompt",
    "data.input": "data.prompt",
    "data.output": "data.response",
    "completion": "data.response",
    "answer": "data.response",
    "text-column": "data.text",
    "label-column": "data.label",
    # adapters
    "r": "lora.rank",
    "lora-r": "lora.rank",
    "lora-rank": "lora.rank",
    "ranks": "lora.rank",
    "lora-alpha": "lora.alpha",
    "lora-dropout": "lora.dropout",
    "use-rslora": "lora.rslora",
    "lora.modules": "lora.target-modules",
    "lora.targets": "lora.target-modules",
    "lora-target": "lora.target-modules",
    "lora-target-modules": "lora.target-modules",
    # local training
    "lr": "local.learning-rate",
    "num-epochs": "local.epochs",
    "num-train-epochs": "local.epochs",
    "local-epochs": "local.epochs",
    "steps": "local.max-steps",
    "local-steps": "local.max-steps",
    "local.batch": "local.batch-size",
    "micro-batch-size": "local.batch-size",
    "train-batch-size": "local.batch-size",
    "per-device-train-batch-size": "local.batch-size",
    "grad-accum": "local.accumulation",
    "gradient-accumulation": "local.accumulation",
    "gradient-accumulation-steps": "local.accumulation",
    "lr-scheduler": "local.schedule",
    "lr-scheduler-type": "local.schedule",
    "scheduler": "local.schedule",
    "warmup-ratio": "local.warmup",
    "warmup-steps": "local.warmup",
    "wd": "local.weight-decay",
    "grad-clip": "local.max-grad-norm",
    "clip-grad": "local.max-grad-norm",
    "gradient-clipping": "local.max-grad-norm",
    "gradient-checkpointing": "local.checkpointing",
    "mixed-precision": "local.precision",
    "bf16": "local.precision=bfloat16",
    # evaluation and wire
    "eval-steps": "evaluate.every",
    "eval-every": "evaluate.every",
    "eval-batch-size": "evaluate.batch-tokens",
    "evaluate.batch-size": "evaluate.batch-tokens",
    "per-device-eval-batch-size": "evaluate.batch-tokens",
    "max-eval-samples": "evaluate.max-examples",
    "compression": "wire.dtype",
}


def known_synonym(spelled: str, known: Collection[str]) -> str:
    """What a key of another program means here: one of the known keys, or one with its value.

    Empty where nothing is known of it. spelled: in lower case, with hyphens.

    >>> known_synonym("training.lr", ["local.learning-rate"]), known_synonym("lr", ["rank"])
    ('local.learning-rate', '')
    """
    last = spelled.rpartition(".")[2]
    meant = SYNONYMS.get(spelled) or SYNONYMS.get(last, "")
    return meant if meant.partition("=")[0] in known else ""
