"""Write the data of the tiny examples: problems to train on, held-out ones, and text corpora.

python examples/tiny/build_data.py --output runs/tiny/data
"""

import argparse
from pathlib import Path

from megatron_dlm.data.arithmetic import Split, write_documents, write_examples

FILES: dict[str, tuple[Split, int, int]] = {
    # file name: (split, seed, number of examples)
    "train.jsonl": ("train", 1, 200_000),
    "prompts.jsonl": ("train", 2, 8_000),
    "heldout.jsonl": ("heldout", 3, 500),
    "corpus.jsonl": ("train", 4, 100_000),
    "corpus_heldout.jsonl": ("heldout", 5, 1_000),
}


def main() -> None:
    """Write all files into the output folder."""
    parser = argparse.ArgumentParser(description="Write the data of the tiny examples.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--only", choices=sorted(FILES), nargs="*", help="write only these files")
    options = parser.parse_args()
    for name in options.only or FILES:
        split, seed, num = FILES[name]
        write = write_documents if name.startswith("corpus") else write_examples
        write(options.output / name, split, seed, num)


if __name__ == "__main__":
    main()
