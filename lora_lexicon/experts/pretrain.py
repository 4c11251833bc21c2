"""The embedded base: a small Llama trained from scratch on WordNet. Knows nothing of experts.

`make tiny` runs it. It never sees a headword of a valid or test split (`data.split`), nor a
definition that stands in one, nor a headword of the demo's sample: the demo's experts learn
entries that are new to the base, as they would on a large one.
"""

import json
import random
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from lora_lexicon.data.entry import Row, headword
from lora_lexicon.data.prompt import PromptEncoder, PromptTemplate, collate
from lora_lexicon.data.sample import in_sample
from lora_lexicon.data.split import split_of
from lora_lexicon.errors import ExpertError
from lora_lexicon.folders import read_record

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class PretrainRecipe:
    """How the embedded base is made; every field is a key of `configs/tiny/base.yaml`."""

    vocab_size: int = 8192  # tokens of the byte-level BPE
    hidden_size: int = 256  # of the states between layers
    intermediate_size: int = 1024  # of the FFNs
    num_hidden_layers: int = 4  # the base's layers
    num_attention_heads: int = 4  # as many of keys and values
    max_position_embeddings: int = 512  # tokens
    tie_word_embeddings: bool = False  # a table that is only read costs bytes, no time
    epochs: float = 5.0  # how often the rows are read
    batch_tokens: int = 2048  # tokens a step, in rows of like length
    learning_rate: float = 3e-3  # the highest, at the end of the warm-up; then down a line to 0
    warmup_steps: int = 100  # in which the learning rate rises from 0
    weight_decay: float = 0.1  # decoupled, as AdamW has it
    prompt_share: float = 0.3  # of the entries without a context, how many are written as prompts
    compile: bool = True  # torch.compile: half again as fast here; needs a C compiler
    seed: int = 42  # of the splits, of new weights and of the rows' order


def select(rows: Iterable[Row], seed: int) -> list[tuple[str, str, str]]:
    """(term, context, definition) rows the base may see.

    Left out: headwords of valid and test, headwords of the demo's sample that have a context, and
    every definition that such a headword has. A definition without a context appears once.
    """
    rows = [row for row in rows if not row.error]
    held, chosen = set(), []
    for row in rows:
        term = str(row.term)
        kept_back = split_of(term, seed) != "train" or (bool(row.contexts) and in_sample(term))
        if kept_back:
            held.add(headword(str(row.definition)))
        else:
            chosen.append(row)
    held_words = {headword(str(row.term)) for row in rows if row.contexts and in_sample(str(row.term))}
    texts: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    for row in chosen:
        term, definition = str(row.term), str(row.definition)
        key = headword(definition)
        if key in held or headword(term) in held_words:
            continue
        texts += [(term, str(context), definition) for context in row.contexts]
        if not row.contexts and key not in seen:
            texts.append((term, "", definition))
        seen.add(key)
    return texts


@dataclass(frozen=True)
class Seen:
    """What `training.json` says of the data that a base read: how many rows, and the seed of its splits."""

    rows: int
    seed: int

    def held_back(self, term: str) -> bool:
        """Whether `select` leaves a headword out whatever the dictionary; others it may have taken."""
        return split_of(term, self.seed) != "train"


def seen_by(base: Path) -> Seen:
    """What a base that `pretrain` made says of its training data.

    Raises:
        ExpertError: it was made otherwise, and says nothing.
    """
    record = read_record(base / "training.json", ExpertError, "a base made by `train base`, which says what it read")
    recipe, rows = record.get("recipe"), record.get("rows")
    seed = recipe.get("seed") if isinstance(recipe, dict) else None
    if type(rows) is not int or type(seed) is not int:
        raise ExpertError(f"{base / 'training.json'} lacks rows or recipe.seed: it says nothing of what the base read")
    return Seen(rows, seed)


def train_tokenizer(texts: list[tuple[str, str, str]], vocab_size: int) -> Any:
    """A byte-level BPE of `vocab_size` on the texts and the prompt's own words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    template = PromptTemplate()
    bpe.train_from_iterator((f"{template.text(t, c)}\n{d}" for t, c, d in texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=512, **SPECIAL)


def rows_of(texts: list[tuple[str, str, str]], encoder: PromptEncoder, recipe: PretrainRecipe) -> list[dict[str, Any]]:
    """Token rows; the loss covers all of them (prompt_length 1). `term: definition` lines stand for some prompts."""
    rng = random.Random(recipe.seed)
    tokenizer, rows = encoder.tokenizer, []
    for term, context, definition in texts:
        if context or rng.random() < recipe.prompt_share:
            ids = encoder.row(term, context, definition).ids
        else:
            ids = tokenizer.encode(f"{term}: {definition}", add_special_tokens=False)[:126]
            ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "prompt_length": 1})
    return rows


def batches_of(rows: list[dict[str, Any]], tokens: int, seed: int) -> list[list[dict[str, Any]]]:
    """The rows in batches of at most `tokens` tokens with padding (a longer row is a batch alone).

    Rows of like length go together, at random among their like; every row is in one batch.
    """
    rows = random.Random(seed).sample(rows, len(rows))
    batches: list[list[dict[str, Any]]] = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if not batches or (len(batches[-1]) + 1) * len(row["input_ids"]) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def _tensors(rows: list[dict[str, Any]], pad: int) -> dict[str, Any]:
    """A batch without its mask: padding is on the right, where causal attention never looks back at it."""
    batch = collate(rows, pad)
    return {"input_ids": batch["input_ids"], "labels": batch["labels"]}


def pretrain(rows: Iterable[Row], out: Path, recipe: PretrainRecipe, notice: str) -> dict[str, Any]:
    """Trains tokenizer and base; writes both (bfloat16), `training.json`, a model card and NOTICE into `out`.

    Returns what `training.json` holds. Until the end, checkpoints lie in `out/checkpoints`, and the same
    call goes on from the last one; `seconds` then counts from there.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    texts = select(rows, recipe.seed)
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    data = rows_of(texts, PromptEncoder(tokenizer), recipe)
    tokens = sum(len(row["input_ids"]) for row in data)
    set_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            num_key_value_heads=recipe.num_attention_heads,
            max_position_embeddings=recipe.max_position_embeddings,
            tie_word_embeddings=recipe.tie_word_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if recipe.compile:
        model.compile(dynamic=True)
    batches = batches_of(data, recipe.batch_tokens, recipe.seed)
    checkpoints = out / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=1,  # an item is a batch already; the Trainer shuffles them
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.98,
        logging_steps=min(20, len(batches)),
        save_steps=200,
        save_total_limit=1,
        seed=recipe.seed,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=batches,  # type: ignore[arg-type]
        data_collator=lambda items: _tensors(items[0], tokenizer.pad_token_id),
    )
    started = time.time()
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    seen = int(tokens * recipe.epochs)
    parameters = sum(p.numel() for p in model.parameters())
    looked_up = 0 if recipe.tie_word_embeddings else recipe.vocab_size * recipe.hidden_size  # costs no arithmetic
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    last_epoch = [entry["loss"] for entry in losses if entry["epoch"] > recipe.epochs - 1]
    record = {
        "recipe": asdict(recipe),
        "rows": len(data),
        "tokens_seen": seen,
        "parameters": parameters,
        "flops": 6 * (parameters - looked_up) * seen,
        "final_loss": sum(last_epoch) / len(last_epoch),
        "losses": [[entry["step"], entry["loss"]] for entry in losses],
        "seconds": round(time.time() - started),
        "hardware": _hardware(),
    }
    cast(Any, model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "NOTICE").write_text(notice, encoding="utf-8")
    (out / "README.md").write_text(card(record), encoding="utf-8")
    shutil.rmtree(checkpoints)
    return record


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads ({torch.backends.cpu.get_cpu_capability()})"


def card(record: dict[str, Any]) -> str:
    """The model card of a base, from what `training.json` holds."""
    recipe = record["recipe"]
    return f"""---
license: other
license_name: wordnet
language: en
library_name: transformers
tags: [definition-modeling, llama]
---
# The embedded base of lora-lexicon

A Llama of {record["parameters"]:,} parameters ({recipe["num_hidden_layers"]} layers, hidden size \
{recipe["hidden_size"]}, byte-level BPE of {recipe["vocab_size"]:,} tokens, bfloat16, English), trained from nothing.
It is there to try the toolkit without GPU or network. Its glosses look like WordNet's; what they say is often wrong.

| | |
|---|---|
| data | {record["rows"]:,} glosses and examples of WordNet 3.0, and nothing else |
| left out | every headword of a valid or test split, and those of the demo's sample, with their definitions |
| tokens seen | {record["tokens_seen"]:,} ({recipe["epochs"]:g} epochs) |
| compute | {record["flops"]:.2g} floating-point operations (6 per token and parameter, input embeddings aside) |
| training loss | {record["final_loss"]:.3f} nats per token, mean of the last epoch |
| hardware, time | {record["hardware"]}, {record["seconds"]:,} s |

Made by `lora-lexicon train base WORDNET --recipe tiny/base`; every setting and the course of the loss are in
`training.json`. WordNet's licence, which these files carry on, is in `NOTICE`.

Prompts are `"CONTEXT" What is the definition of "TERM"?` between BOS and EOS; the definition follows.
"""
