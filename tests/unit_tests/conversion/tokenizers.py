"""A tiny tokenizer in the shape of Qwen3's: no MASK, and a free id after its last one."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

MASK_TOKEN_ID = 30


def save_tokenizer(folder: Path, first_free_id: int = MASK_TOKEN_ID) -> Path:
    """Write a tokenizer whose ids are 0 to `first_free_id` - 1."""
    letters = [chr(ord("a") + i) if i < 26 else f"x{i}" for i in range(first_free_id - 2)]
    vocabulary = {"<|endoftext|>": 0, "<|im_end|>": 1}
    vocabulary |= {letter: number + 2 for number, letter in enumerate(letters)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocab=vocabulary, merges=[])),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    ).save_pretrained(folder)
    return folder
