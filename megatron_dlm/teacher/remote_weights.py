"""The weights of a teacher behind servers, as far as a run that does not hold them asks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.config import Config
from megatron_dlm.data.token_shards import ALONE, Ranks
from megatron_dlm.models.architecture import (
    Architecture,
    architecture_from_hf,
    read_diffusion_kind,
)
from megatron_dlm.stop_request import StopRequest, StopRequested
from megatron_dlm.teacher.client import POLL_SECONDS, Asked, TeacherClient
from megatron_dlm.teacher.wire import TeacherIdentity
from megatron_dlm.types.diffusion_kind import DiffusionKind


@dataclass(frozen=True)
class RemoteWeights:
    """In the place of `ModelSource`.

    Attributes:
        path: The first server's address.
        field: The flag it was named with.
        identity: What the servers say of themselves.
        architecture: From their config.json.
    """

    path: str
    field: str
    identity: TeacherIdentity
    architecture: Architecture

    is_megatron: bool = False

    @property
    def hf_folder(self) -> Path:
        """On the server; nothing here reads it."""
        return Path(self.identity.name)

    @property
    def diffusion_kind(self) -> DiffusionKind | None:
        """Kind of diffusion model; None for an autoregressive model."""
        return read_diffusion_kind(self.architecture.hf_config, self.path)

    @property
    def is_autoregressive(self) -> bool:
        """Whether it is no diffusion model."""
        return self.diffusion_kind is None

    def fingerprint(self) -> str:
        """That of the weights on the server."""
        return self.identity.fingerprint


def _wait(asked: Asked[Any], ranks: Ranks, request: StopRequest | None) -> None:
    """Wait until all ranks have their answers, or one of them never will; all of them call this."""
    waits, fails = 1, 0
    while waits and not fails:
        asked.wait(POLL_SECONDS)
        ACTIVITY.step()  # a server that hangs has a timeout of its own
        if code := ranks.highest(0 if request is None else request.code):
            asked.cancel()
            raise StopRequested(code)
        waits = ranks.highest(int(not asked.has_ended))
        fails = ranks.highest(int(asked.error is not None))


def url_client(config: Config) -> TeacherClient:
    """Reaches the servers in `--teacher-url`."""
    own = config.teacher
    return TeacherClient(
        own.teacher_url,
        field="--teacher-url",
        max_requests=own.teacher_max_requests,
        timeout_s=own.teacher_timeout_s,
    )


def remote_weights(
    config: Config,
    client: TeacherClient,
    ranks: Ranks = ALONE,
    request: StopRequest | None = None,
) -> RemoteWeights:
    """What the servers in `--teacher-url` hold; all `ranks` call this.

    Args:
        config: Of the run.
        client: Reaches them.
        ranks: Who asks together.
        request: The wish to stop of this process, looked at meanwhile.

    Raises:
        UserError: They do not answer one of the ranks, or their model is not supported here; on all
            of them.
        StopRequested: One of the ranks was asked to stop before they did; on all of them.
    """
    asked, found = client.ask_identity(), None
    _wait(asked, ranks, request)
    with ranks.errors_on_all():
        if asked.has_ended:
            found = _weights(config, client.learn_identity(asked))
        else:
            asked.cancel()
    assert found is not None  # or another rank has said what was refused
    return found


def _weights(config: Config, identity: TeacherIdentity) -> RemoteWeights:
    url = config.teacher.teacher_url[0]
    where = f"{url}: config.json"
    architecture = architecture_from_hf(identity.hf_config, where, identity.generation_config)
    return RemoteWeights(url, "--teacher-url", identity, architecture)
