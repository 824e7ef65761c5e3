"""SGLang's server in a process and an environment of its own, on the CPU."""

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx2

START_SECONDS = 900.0

_VERSIONS = """
import json, platform
from importlib.metadata import version
names = ("sglang", "torch", "torchvision", "transformers", "tokenizers", "triton", "xgrammar")
print(json.dumps({"python": platform.python_version(), **{n: version(n) for n in names}}))
"""


def environment_versions(environment: Path) -> dict[str, str]:
    """Of Python and packages in an environment."""
    command = [str(environment / "bin/python"), "-c", _VERSIONS]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    decoded: dict[str, str] = json.loads(answer)
    return decoded


class SglangServer:
    """A server of an `sdar` folder, from its start to the end of a `with` block.

    Args:
        environment: Made by `environment.sh`.
        folder: An export.
        log: File for its output.

    Attributes:
        url: Its address.
    """

    def __init__(self, environment: Path, folder: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        words: list[object] = [environment / "bin/python", "-m", "sglang.launch_server"]
        words += ["--model-path", folder, "--trust-remote-code", "--dtype", "float32"]
        words += ["--dllm-algorithm", "LowConfidence"]
        words += ["--dllm-algorithm-config", folder / "dllm_config.yaml"]
        words += ["--device", "cpu", "--attention-backend", "torch_native", "--disable-cuda-graph"]
        words += ["--max-running-requests", 8, "--max-total-tokens", 4096]
        words += ["--host", "127.0.0.1", "--port", port]
        variables = {
            **os.environ,
            "SGLANG_USE_CPU_ENGINE": "1",
            "PYTHONPATH": str(Path(__file__).parent / "kernel_names"),
        }
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [str(word) for word in words],
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "SglangServer":
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._end()
                raise RuntimeError(f"SGLang does not start:\n{self._log.read_text()[-4000:]}")
            with suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return self
            time.sleep(1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        """End its scheduler and detokenizer too."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
