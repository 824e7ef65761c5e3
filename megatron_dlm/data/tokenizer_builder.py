"""Build the tokenizer of the tiny models: a small byte-level BPE like Qwen's.

    python -m megatron_dlm.data.tokenizer_builder --output examples/tiny/qwen3

Qwen's pre-tokenisation (every digit on its own), ChatML template and special tokens; any text can
be encoded because all 256 bytes are in the vocabulary. The build depends on nothing but this
package, so that it gives the same files every time.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_dlm.data.arithmetic import examples
from megatron_dlm.entry import report_user_errors
from megatron_dlm.errors import bad_value

PAD_TOKEN = "<|endoftext|>"
START_TOKEN = "<|im_start|>"
EOS_TOKEN = "<|im_end|>"
MASK_TOKEN = "<|MASK|>"
SPECIAL_TOKENS = (PAD_TOKEN, START_TOKEN, EOS_TOKEN, MASK_TOKEN)

VOCAB_SIZE = 512
"""Size of the vocabulary with special tokens; divisible by tensor-parallel sizes."""
TRAINING_EXAMPLES = 4000
TRAINING_SEED = 0

_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def build_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the train split of the arithmetic problems.

    Args:
        vocab_size: Upper bound of the vocabulary, special tokens included.

    Returns:
        A tokenizer whose special tokens have the highest ids.

    Raises:
        UserError: The vocabulary is too small for all bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise bad_value(
            "--vocab-size",
            vocab_size,
            "does not hold all bytes and special tokens",
            f"use at least {smallest}",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        mask_token=MASK_TOKEN,
        chat_template=CHAT_TEMPLATE,
        # As Qwen3's: otherwise transformers 4 adds token types, which its `generate` refuses.
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer files into a folder, creating it if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes its new class name, which transformers 4 does not know.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _training_texts() -> Iterator[str]:
    for example in islice(examples("train", TRAINING_SEED), TRAINING_EXAMPLES):
        # Every sequence contains the words of the chat template.
        yield "user\n" + example["messages"][0]["content"]
        yield "assistant\n" + example["response"]


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Build the tokenizer into a folder; exit status 2 for arguments that cannot work."""
    parser = argparse.ArgumentParser(description="Build the tokenizer of the tiny models.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    options = parser.parse_args(arguments)
    save_tokenizer(build_tokenizer(options.vocab_size), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
