"""A response and the order in which it was decoded, as plain values for JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_dlm.evaluation.text_stream import INCOMPLETE
from megatron_dlm.rollout.decoding_options import STRATEGY_OPTIONS
from megatron_dlm.rollout.generation_config import GenerationConfig
from megatron_dlm.types.trajectory import Trajectory

_WORD_START = "\u2581"  # SentencePiece's sign for a space


def trajectory_record(
    trajectory: Trajectory,
    generation: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    setting: str,
    seed: int,
    prompt_index: int,
) -> dict[str, Any]:
    """What the page of `megatron-dlm trajectory` shows; `docs/data-formats.md` lists the fields.

    Args:
        trajectory: With `confidence`.
        generation: How it was decoded.
        tokenizer: Has the texts of tokens.
        setting: Name of these settings.
        seed: Of the draws.
        prompt_index: Place of the prompt in its file, from 0.
    """
    response_ids, tail_ids = trajectory.response_ids.tolist(), trajectory.tail_ids.tolist()
    rounds = trajectory.rounds
    if rounds:
        blocks, steps, forwards = _order_of_rounds(trajectory, generation)
    else:
        blocks, steps, forwards = _order(trajectory, generation)
    assert trajectory.confidence is not None
    confidence = [float(f"{value:.4g}") for value in trajectory.confidence.tolist()]

    def part(token_ids: list[int], own: slice) -> dict[str, Any]:
        return {
            "token_ids": token_ids,
            "texts": token_texts(token_ids, tokenizer),
            "block": blocks[own],
            "step": steps[own],
            "forward": forwards[own],
            "confidence": confidence[own],
        }

    prompt_ids, length = trajectory.prompt_ids.tolist(), len(response_ids)
    special = set(tokenizer.all_special_ids) & {*response_ids, *tail_ids}
    if rounds:
        special |= set(tokenizer.all_special_ids) & {id for r in rounds for id in r.draft_ids}
    stated = _stated(generation)
    settings = {name: value for name, value in asdict(generation).items() if name in stated}
    record = {
        "prompt_index": prompt_index,
        "setting": setting,
        "seed": seed,
        "settings": settings,
        "prompt": {"token_ids": prompt_ids, "texts": token_texts(prompt_ids, tokenizer)},
        "response": part(response_ids, slice(length)),
        "tail": part(tail_ids, slice(length, None)),
        "special_token_ids": sorted(special),
        "canvas_length": trajectory.canvas_length,
        "denoising_forwards": trajectory.denoising_forwards,
        "total_forwards": trajectory.total_forwards,
    }
    if rounds:
        record["rounds"] = [
            {
                "first": r.first,
                "forward": r.forward,
                "draft_ids": list(r.draft_ids),
                "draft_texts": token_texts(r.draft_ids, tokenizer),
                "num_accepted": r.num_accepted,
                "draws_next": r.next_id is not None,
            }
            for r in rounds
        ]
    return record


def _stated(generation: GenerationConfig) -> set[str]:
    """Settings that decided the response: how many are decoded at once did not."""
    decides = {"temperature", "top_k", "top_p", "remasking_strategy", *STRATEGY_OPTIONS}
    return decides & generation.options_read | {"block_size", "attention_pattern", "shifted"}


def _order(
    trajectory: Trajectory, generation: GenerationConfig
) -> tuple[list[int], list[int], list[int]]:
    """Block, step in it and forward of each token of response and tail.

    Blocks count from 0 with the one that the response begins in, steps and forwards from 1, of the
    forwards that drew tokens for this sequence.
    """
    first = len(trajectory.prompt_ids)
    count = len(trajectory.response_ids) + len(trajectory.tail_ids)
    if generation.is_autoregressive:
        return list(range(count)), [1] * count, list(range(1, count + 1))
    steps = [*trajectory.unmask_step.tolist(), *trajectory.tail_unmask_step.tolist()]
    blocks = _blocks(first, count, generation)
    forwards: list[int] = []
    before, current = 0, 0  # forwards of earlier blocks, and of them and this one
    for i, (block, step) in enumerate(zip(blocks, steps, strict=True)):
        if i and block != blocks[i - 1]:
            before = current
        current = max(current, before + step)
        forwards.append(before + step)
    return blocks, steps, forwards


def _order_of_rounds(
    trajectory: Trajectory, generation: GenerationConfig
) -> tuple[list[int], list[int], list[int]]:
    """The same of a response whose drafts were verified: a step is a round that settled tokens.

    The last token of a round may be the first of the next block, whose first step it then is.
    """
    count = len(trajectory.response_ids)
    forwards = [r.forward for r in trajectory.rounds for _ in range(r.num_settled)][:count]
    blocks = _blocks(len(trajectory.prompt_ids), count, generation)
    order: dict[int, list[int]] = {}
    steps = []
    for block, forward in zip(blocks, forwards, strict=True):
        of_block = order.setdefault(block, [])
        if forward not in of_block:
            of_block.append(forward)
        steps.append(len(of_block))
    return blocks, steps, forwards


def _blocks(first: int, count: int, generation: GenerationConfig) -> list[int]:
    """Blocks of `count` tokens from position `first` on."""
    size = generation.block_size
    return [0 if size is None else (first + i) // size - first // size for i in range(count)]


def token_texts(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token; of one that holds no whole character, its bytes: `<E4 B8>`."""
    texts: dict[int, str] = {}
    for token_id in token_ids:
        if token_id not in texts:
            texts[token_id] = _token_text(token_id, tokenizer)
    return [texts[token_id] for token_id in token_ids]


def _token_text(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if not isinstance(piece, str):  # an id that the tokenizer does not have
        return f"<{token_id}>"
    if INCOMPLETE in text and piece != text:
        return _bytes_of(piece)
    if piece.startswith(_WORD_START) and not text.startswith(" "):
        return " " + text  # decoding drops the space before a first word
    return text


def _bytes_of(piece: str) -> str:
    """Bytes of a token, by SentencePiece's name for one or by the alphabet of byte-level BPE."""
    named = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    if named:
        return f"<{named[1]}>"
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in piece):
        return f"<{' '.join(f'{alphabet[character]:02X}' for character in piece)}>"
    return piece


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, others for 256 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}
