"""The student's weights to the servers that decode for it, under the names of an export.

Two ways. `GroupTransfer` broadcasts them bucket by bucket from rank 0 to all ranks of all servers
(SGLang's `update_weights_from_distributed`): NCCL between GPUs, gloo between CPUs. `FolderTransfer`
writes an export where the servers can read it (`update_weights_from_disk`). The shards of tensor-,
pipeline- and expert-parallel ranks are gathered one parameter at a time, so that rank 0 holds one
bucket and one parameter at most.
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from megatron_dlm import platform
from megatron_dlm.conversion.hf_export import export_hf, model_tensors
from megatron_dlm.conversion.publishing import is_writer
from megatron_dlm.errors import UserError
from megatron_dlm.models.architecture import Architecture
from megatron_dlm.parallel import errors_on_all_ranks
from megatron_dlm.rollout.external.client import RefusedRequest, RolloutServer
from megatron_dlm.rollout.external.weight_group import (
    Bucket,
    WeightGroup,
    flattened,
    open_store,
    weight_group,
)

BUCKET_BYTES = 512 << 20
"""Bytes of tensors that are sent together, but for a larger one, which goes alone."""

GROUP_TIMEOUT = timedelta(minutes=10)

LEAVE_SECONDS = 10.0
"""That a server has to leave a group."""

BEGIN, END = "/begin_weight_update", "/end_weight_update"
"""Buckets are sent between these two: SGLang takes none outside."""

Named = tuple[str, Tensor]


class GroupTransfer:
    """Broadcasts weights to the servers; see `WeightSender`.

    Args:
        model: This rank's part of the student.
        architecture: Of the student.
        format: Target format of exports whose names the servers expect.
        iteration: Optimizer updates done.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        architecture: Architecture,
        format: str,
        iteration: Callable[[], int],
    ) -> None:
        self._model = model
        self._architecture = architecture
        self._format = format
        self._iteration = iteration
        self._name = f"megatron_dlm_{uuid.uuid4().hex}"
        self._group: WeightGroup | None = None
        self._is_open = False
        self._store: Any = None  # the others meet there, so it has to stay

    @property
    def version(self) -> int:
        """See `WeightSender`."""
        return self._iteration()

    def send(self, servers: Sequence[RolloutServer]) -> None:
        """See `WeightSender`."""
        error: UserError | None = None
        buckets, threads = self._buckets(), ThreadPoolExecutor(len(servers))
        while True:
            # Other ranks send their shards in here, whatever the servers say.
            bucket = next(buckets, None)
            if bucket is None:
                break
            if error is None:
                tensors, is_last = bucket
                try:
                    self._begin(servers)
                    self._send(threads, servers, tensors, is_last)
                    if is_last:
                        self._end(servers)
                except UserError as refused:
                    error = refused
                except RuntimeError as failed:
                    problem = f"the weights have not arrived ({failed})"
                    error = servers[0].refuse(problem, "see the log of each server")
                if error is not None:
                    self._give_up(servers)
        threads.shutdown(wait=False)
        with errors_on_all_ranks():
            if error is not None:
                raise error

    def close(self, servers: Sequence[RolloutServer]) -> None:
        """See `WeightSender`."""
        if self._group is not None:
            self._group = None
            self._dissolve(servers)

    def _begin(self, servers: Sequence[RolloutServer]) -> None:
        """Open an update, unless it is open; one that an earlier run has left open ends first."""
        if self._is_open:
            return
        self._is_open = True
        for server in servers:
            try:
                answer = server.post(BEGIN, {}, retries=0)
            except RefusedRequest as refused:
                if refused.status != HTTPStatus.BAD_REQUEST:
                    raise
                self._end_left_open(server)
                answer = server.post(BEGIN, {}, retries=0)
            _check_success(server, BEGIN, answer)

    def _end(self, servers: Sequence[RolloutServer]) -> None:
        """Close the update: servers bring the weights into the form that they compute with."""
        for server in servers:
            _check_success(server, END, server.post(END, {}, retries=0))
        self._is_open = False

    def _give_up(self, servers: Sequence[RolloutServer]) -> None:
        """Close an update that has failed."""
        self._is_open = False
        for server in servers:
            self._end_left_open(server)

    def _end_left_open(self, server: RolloutServer) -> None:
        """Close an update that does not come to its end, if the server can."""
        with suppress(UserError):
            leaving = replace(server, timeout_s=min(server.timeout_s, LEAVE_SECONDS))
            leaving.post(END, {}, retries=0)

    def _dissolve(self, servers: Sequence[RolloutServer]) -> None:
        """Have all servers leave the group."""
        for server in servers:
            with suppress(UserError):  # it may have gone
                body = {"group_name": self._name}
                leaving = replace(server, timeout_s=min(server.timeout_s, LEAVE_SECONDS))
                leaving.post("/destroy_weights_update_group", body, retries=0)

    def _buckets(self) -> Iterator[tuple[list[Named], bool]]:
        """Tensors that are sent together, on rank 0; and whether they are the last ones."""
        bucket: list[Named] = []
        size = 0
        for name, tensor in model_tensors(self._model, self._architecture, self._format):
            # Bytes of one type stay aligned.
            is_other = bool(bucket) and tensor.dtype != bucket[-1][1].dtype
            if bucket and (is_other or size + tensor.nbytes > BUCKET_BYTES):
                yield bucket, False
                bucket, size = [], 0
            bucket.append((name, tensor))
            size += tensor.nbytes
        if bucket:
            yield bucket, True

    def _send(
        self,
        threads: ThreadPoolExecutor,
        servers: Sequence[RolloutServer],
        tensors: list[Named],
        is_last: bool,
    ) -> None:
        """One bucket to all servers, from rank 0."""
        group = self._group or self._meet(threads, servers)
        self._group = None  # in no known state until all have taken it
        bucket = Bucket.of(tensors)
        body: dict[str, Any] = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": is_last,
        }
        if is_last:
            body["weight_version"] = str(self.version)
        path = "/update_weights_from_distributed"
        answers = [threads.submit(server.post, path, body, retries=0) for server in servers]
        work = group.begin_broadcast(flattened(tensors))
        try:
            _wait(work.is_completed, answers)
        except UserError:
            # What was begun ends when the others leave; else it would for as long as its timeout.
            self._dissolve(servers)
            raise
        work.wait()
        for server, answer in zip(servers, answers, strict=True):
            _check_success(server, path, answer.result())
        self._group = group

    def _meet(self, threads: ThreadPoolExecutor, servers: Sequence[RolloutServer]) -> WeightGroup:
        """Make the group of rank 0 and all ranks of all servers.

        Raises:
            UserError: A server cannot join.
        """
        ranks = [_ranks_of(server) for server in servers]
        size, first = 1 + sum(ranks), 1
        self._name = f"megatron_dlm_{uuid.uuid4().hex}"
        self._store = open_store(GROUP_TIMEOUT)
        path = "/init_weights_update_group"
        answers = []
        for server, count in zip(servers, ranks, strict=True):
            body = {
                "master_address": address_towards(server),
                "master_port": self._store.port,
                "rank_offset": first,
                "world_size": size,
                "group_name": self._name,
                "backend": platform.collective_backend(),
            }
            answers.append(threads.submit(server.post, path, body, retries=0))
            first += count
        met: Future[WeightGroup] = Future()
        backend = platform.collective_backend()

        def meet() -> None:
            try:
                group = weight_group(
                    self._store,
                    self._name,
                    rank=0,
                    size=size,
                    backend=backend,
                    timeout=GROUP_TIMEOUT,
                )
                met.set_result(group)
            except RuntimeError as error:
                met.set_exception(error)

        # A thread that nobody waits for: where a server refuses, the others do not come.
        threading.Thread(target=meet, name="weight group", daemon=True).start()
        _wait(met.done, answers)
        for server, answer in zip(servers, answers, strict=True):
            _check_success(server, path, answer.result())
        return met.result()


def _ranks_of(server: RolloutServer) -> int:
    """Ranks of a server that load weights.

    Raises:
        UserError: It has several replicas, which SGLang sends nothing to.
    """
    info = server.get("/server_info")
    replicas, ranks = info.get("dp_size") or 1, info.get("tp_size") or 1
    if replicas != 1:
        raise server.refuse(
            f"dp_size is {replicas}, and SGLang takes weights from a group for one replica only",
            "start several servers, or choose --rollout-engine-weights disk",
        )
    return int(ranks)


def address_towards(server: RolloutServer) -> str:
    """The address of this machine that a server can reach it at."""
    parts = urlsplit(server.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise server.refuse(f"its address is not known ({error})", "name its host") from error


def _wait(is_done: Callable[[], bool], answers: Sequence[Future[Any]]) -> None:
    """Wait for something that all servers take part in.

    Raises:
        UserError: One of them has refused.
    """
    deadline = time.monotonic() + GROUP_TIMEOUT.total_seconds()
    while not is_done():
        for answer in answers:
            if answer.done() and answer.exception() is not None:
                answer.result()
        if time.monotonic() > deadline:
            return  # what is waited for has the same limit, and says what is wrong
        time.sleep(0.002)


def _check_success(server: RolloutServer, path: str, answer: Any) -> None:
    if not (isinstance(answer, dict) and answer.get("success")):
        message = answer.get("message") if isinstance(answer, dict) else answer
        raise server.refuse(f"{path} has failed ({message})", "see the server's log")


class FolderTransfer:
    """Writes weights where the servers can read them; see `WeightSender`.

    Args:
        model: This rank's part of the student.
        architecture: Of the student, with the config.json that exports get.
        folder: That all hosts see; it is replaced, and removed once the servers have read it.
        iteration: Optimizer updates done.
        export: Other arguments of `export_hf`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        architecture: Architecture,
        folder: Path,
        iteration: Callable[[], int],
        **export: Any,
    ) -> None:
        self._model = model
        self._architecture = architecture
        self._folder = folder
        self._iteration = iteration
        self._export = export

    @property
    def version(self) -> int:
        """See `WeightSender`."""
        return self._iteration()

    def send(self, servers: Sequence[RolloutServer]) -> None:
        """See `WeightSender`."""
        export_hf(self._model, self._architecture, self._folder, overwrite=True, **self._export)
        with errors_on_all_ranks():
            if is_writer():
                self._announce(servers)

    def close(self, servers: Sequence[RolloutServer]) -> None:
        """See `WeightSender`."""

    def _announce(self, servers: Sequence[RolloutServer]) -> None:
        path = "/update_weights_from_disk"
        body = {
            "model_path": str(self._folder.resolve()),
            "weight_version": str(self.version),
            "flush_cache": True,
        }
        try:
            with ThreadPoolExecutor(len(servers)) as threads:
                answers = [threads.submit(server.post, path, body) for server in servers]
            for server, answer in zip(servers, answers, strict=True):
                _check_success(server, path, answer.result())
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
