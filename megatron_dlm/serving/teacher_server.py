"""A teacher that answers over HTTP: the model in the main threads of its ranks, servers on some."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_dlm import platform
from megatron_dlm.activity import ACTIVITY
from megatron_dlm.config import Config
from megatron_dlm.data.tokenizer import has_tokenizer, load_tokenizer
from megatron_dlm.errors import UserError
from megatron_dlm.parallel import ParallelGroups, errors_on_all_ranks
from megatron_dlm.planning.layouts import Layout
from megatron_dlm.planning.memory import forward_bytes
from megatron_dlm.rollout.context import most_tokens
from megatron_dlm.serving.http_process import answering, listening
from megatron_dlm.serving.options import TeacherServerConfig
from megatron_dlm.serving.teacher_app import TeacherApi, create_teacher_app
from megatron_dlm.serving.teacher_queue import Result, TeacherQueue, Wanted
from megatron_dlm.stop_agreement import ranks_in_step
from megatron_dlm.teacher.answering import TextTeacher
from megatron_dlm.teacher.loading import load_teacher
from megatron_dlm.teacher.wire import Drawing, TeacherIdentity, Vocabulary
from megatron_dlm.training.model_source import ModelSource

TICK_SECONDS = 0.5
"""How often ranks without work look whether they are to end."""

BATCHES_OF_PROMPTS = 4
"""So many times the sequences that are decoded at once are answered before texts are read again."""


def serve_teacher(
    source: ModelSource,
    config: Config,
    options: TeacherServerConfig,
    *,
    address: str,
    announce: Callable[[Sequence[str]], None],
    is_over: Callable[[TeacherQueue], bool],
    on_ranks: Callable[[TeacherQueue], ExitStack] | None = None,
) -> None:
    """Answer requests until the end; all ranks of the teacher call this, in its process groups.

    The first of each set of ranks in step listens; these sets hold the same teacher.

    Args:
        source: Of the teacher.
        config: That it is built by (`Config.of_teacher`).
        options: Limits, and the first port.
        address: That this rank's server is reached at.
        announce: Called on the first rank with the servers' addresses once they answer.
        is_over: Asked on all ranks, now and then; what those with a server say counts.
        on_ranks: Entered with the queue around all work.

    Raises:
        UserError: The weights do not fit, or a port is taken; raised on all ranks.
    """
    groups = ParallelGroups.from_parallel_state()
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    in_step = ranks_in_step(groups, timeout)
    first = dist.get_rank() if in_step is None else dist.get_process_group_ranks(in_step)[0]
    firsts = [0] * dist.get_world_size()
    dist.all_gather_object(firsts, first)
    number, is_first = sorted(set(firsts)).index(first), first == dist.get_rank()
    queue = TeacherQueue(BATCHES_OF_PROMPTS * config.rollout.max_running_requests)
    with ExitStack() as stack:
        listener: socket.socket | None = None
        with errors_on_all_ranks():
            if is_first:
                port = options.port and options.port + number
                listener = stack.enter_context(listening(replace(options, port=port)))
        identity = _identity(source, config)
        layout = Layout.of(config, dist.get_world_size())
        taken = functools.partial(forward_bytes, config, source.architecture, layout)
        teacher = TextTeacher(load_teacher(source, config), config, groups, in_step, taken)
        url = None
        if on_ranks is not None:
            stack.enter_context(on_ranks(queue))
        if listener is not None:
            cached = most_tokens(config.rollout.max_total_tokens, groups)
            api = TeacherApi(identity, source.architecture, queue, options, cached)
            app = create_teacher_app(api, options)

            def stop() -> None:
                queue.stopping = True

            stack.enter_context(answering(app, listener, stop))
            host = f"[{address}]" if ":" in address else address
            url = f"http://{host}:{listener.getsockname()[1]}"
        urls: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(urls, url)
        if dist.get_rank() == 0:
            announce([found for found in urls if found is not None])
        _answer(teacher, queue, is_over)


def _answer(
    teacher: TextTeacher, queue: TeacherQueue, is_over: Callable[[TeacherQueue], bool]
) -> None:
    """Compute what waits, on all ranks in step, until it is over."""
    try:
        while True:
            items: list[Any] = []
            wanted: Wanted = 0
            is_end = is_over(queue)
            if teacher.is_first and not is_end:
                items, wanted = queue.take(TICK_SECONDS)
            work = items, wanted, queue.wants_head, is_end
            items, wanted, wants_head, ends = _from_first(teacher.in_step, work)
            ACTIVITY.step()
            if ends:
                queue.fail(RuntimeError("the teacher's server has ended"))
                return
            if wants_head and (head := teacher.head()) is not None:
                queue.give_head(head)
            if items:
                _answer_batch(teacher, queue, items, wanted)
    except Exception as error:
        queue.fail(error)
        raise


def _answer_batch(
    teacher: TextTeacher, queue: TeacherQueue, items: Sequence[Any], wanted: Wanted
) -> None:
    """Compute a batch on all ranks in step; what there is no memory for gets that error."""
    results = _results(teacher, items, wanted)
    if teacher.is_first:
        queue.answer(results)


def _results(
    teacher: TextTeacher, items: Sequence[Any], wanted: Wanted
) -> list[Result | Exception]:
    """Results of a batch, in halves where memory has no room for all of it at once.

    Where there is none for a single one, its error is in its place. Ranks in step divide it alike:
    a KV cache or a forward that one of them has no room for is an error on all of them, before it
    begins. Where one of several ranks runs out of memory all the same, the others are in the middle
    of the forward, and the server ends.
    """
    try:
        if isinstance(wanted, Drawing):
            return list(teacher.responses(items, wanted))
        return list(teacher.targets(items, wanted))
    except (UserError, RuntimeError) as error:
        is_alone = teacher.in_step is None
        if not (isinstance(error, UserError) or (is_alone and platform.is_out_of_memory(error))):
            raise
        if len(items) == 1:
            return [_no_room(error)]
    platform.release_memory()
    half = len(items) // 2
    return [
        *_results(teacher, items[:half], wanted),
        *_results(teacher, items[half:], wanted),
    ]


def _no_room(error: UserError | RuntimeError) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(f"the teacher has no memory for a single one: {str(error).splitlines()[0]}")


def _from_first(in_step: dist.ProcessGroup | None, work: Any) -> Any:
    """What the first of the ranks in step has, on all of them."""
    if in_step is None:
        return work
    box = [work]
    dist.broadcast_object_list(box, src=dist.get_process_group_ranks(in_step)[0], group=in_step)
    return box[0]


def _identity(source: ModelSource, config: Config) -> TeacherIdentity:
    vocabulary = None
    if has_tokenizer(source.hf_folder):
        tokenizer = load_tokenizer(source.hf_folder, source.field)
        added = tokenizer.added_tokens_decoder
        special = tuple(token_id for token_id, token in added.items() if token.special)
        vocabulary = Vocabulary(tokenizer.get_vocab(), special)
    return TeacherIdentity(
        fingerprint=source.fingerprint(),
        name=str(source.path),
        precision=config.teacher_precision,
        hf_config=dict(source.architecture.hf_config),
        generation_config=dict(source.architecture.generation_config),
        vocabulary=vocabulary,
    )
