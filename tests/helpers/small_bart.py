"""A BART that tests can afford, as scripts/teachers/bart_tiny.py writes one, but not trained."""

from pathlib import Path

TEXTS = [
    "A picture of a square 12 said 0.",
    "What color is the square? Answer: blue.",
    "square 3 said 1 red birds",
]
MICRO = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 40,
}


def micro_bart(seed: int = 0, **changes):
    """BartForConditionalGeneration and its tokenizer as transformers have them."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    from scripts.teachers.bart_tiny import train_tokenizer

    tokenizer = train_tokenizer(TEXTS * 3, 300)
    torch.manual_seed(seed)
    config = BartConfig(vocab_size=len(tokenizer), init_std=0.3, **(MICRO | changes))
    return BartForConditionalGeneration(config), tokenizer


def save_bart(folder: Path, **changes) -> Path:
    """Its folder; weights of ours are float16."""
    from scripts.teachers.bart_tiny import write_folder

    write_folder(*micro_bart(**changes), folder)
    return folder
