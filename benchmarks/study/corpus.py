"""The corpora of the study: problems with their answers, as documents of one length."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from benchmarks.environment import REPOSITORY
from benchmarks.study.problems import write_jsonl
from benchmarks.study.recipes import TEACHER, max_response_length
from megatron_dlm.data.prompts import read_examples
from megatron_dlm.data.tokenizer import load_tokenizer, resolve_special_tokens
from megatron_dlm.models.architecture import read_architecture


def write_corpus(prefix: Path, problems: Iterable[dict[str, Any]]) -> None:
    """Write the corpus in Megatron's indexed dataset format, and its text beside it.

    A document is as long as the canvas that a response is decoded on: EOS fills it after the
    response. Otherwise full attention would see the length of the answer in training, which is
    unknown in decoding.
    """
    teacher = read_architecture(REPOSITORY / TEACHER)
    tokenizer = load_tokenizer(REPOSITORY / TEACHER)
    special_tokens = resolve_special_tokens(tokenizer, teacher.hf_config, TEACHER)
    canvas, longest_prompt = max_response_length(), teacher.max_position_embeddings

    text = prefix.with_suffix(".jsonl")
    write_jsonl(text, problems)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for example in read_examples(text, tokenizer, special_tokens, longest_prompt, canvas):
        response = example.response_ids.tolist()
        padding = [special_tokens.eos_token_id] * (canvas - len(response))
        document = [*example.prompt_ids.tolist(), *response, *padding]
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
