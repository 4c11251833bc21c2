"""A 2-layer BERT whose weights are a formula, so that what other programs computed with it can be recorded."""

from pathlib import Path

WORDS = [
    "a",
    "kind",
    "of",
    "river",
    "stone",
    "bright",
    "green",
    "garden",
    "winter",
    "the",
    "that",
    "is",
    "in",
    ",",
    ".",
    "s",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_bert(folder: Path) -> Path:
    """Model (hidden 32) and WordPiece tokenizer in `folder`."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, "##s", "##er"])}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertModel(config)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.dim() > 1):  # the others are 0 or 1
            wave = (torch.arange(1, parameter.numel() + 1, dtype=torch.float64) * 12.9898 + number).sin() * 43758.5453
            parameter.copy_((wave - wave.floor() - 0.5).reshape(parameter.shape))
    model.save_pretrained(folder)
    BertTokenizerFast(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    return folder
