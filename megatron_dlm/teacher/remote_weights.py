"""The weights of a teacher behind servers, as far as a run that does not hold them asks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dlm.activity import ACTIVITY
from megatron_dlm.config import Config
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


def _wait(asked: Asked[Any], request: StopRequest | None) -> None:
    """Wait where there are no process groups of the run yet."""
    while not asked.has_ended:
        asked.wait(POLL_SECONDS)
        ACTIVITY.step()  # a server that hangs has a timeout of its own
        if request is not None and request.code:
            asked.cancel()
            raise StopRequested(request.code)


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
    config: Config, client: TeacherClient, request: StopRequest | None = None
) -> RemoteWeights:
    """What the servers in `--teacher-url` hold.

    Args:
        config: Of the run.
        client: Reaches them.
        request: The wish to stop of this process, looked at meanwhile.

    Raises:
        UserError: They do not answer, or their model is not supported here.
        StopRequested: It was asked to stop before they did.
    """
    client.learn_identity(lambda asked: _wait(asked, request))
    url, identity = config.teacher.teacher_url[0], client.identity
    where = f"{url}: config.json"
    architecture = architecture_from_hf(identity.hf_config, where, identity.generation_config)
    return RemoteWeights(url, "--teacher-url", identity, architecture)
