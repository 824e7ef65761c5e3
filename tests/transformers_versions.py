"""Python environments with other versions of transformers, made once and kept.

They hold transformers and what else has to be of its time; PyTorch and all the rest is that of the
running environment, which comes after it on their path.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def supported_versions() -> tuple[str, str]:
    """The oldest and the newest transformers that exported folders are for."""
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    supported = pyproject["tool"]["megatron-dlm"]["exports"]
    return supported["oldest-transformers"], supported["newest-transformers"]


def python_with_transformers(version: str) -> Path:
    """The interpreter of an environment with that version, which is made if it is not there.

    Raises:
        CalledProcessError: pip cannot install it.
    """
    environment = Path(sys.prefix) / f"transformers-{version}"
    python = environment / "bin" / "python"
    if python.exists():
        return python
    making = environment.with_name(f".{environment.name}.incomplete-{os.getpid()}")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", making], check=True)
    library = f"python{sys.version_info.major}.{sys.version_info.minor}"
    added = making / "lib" / library / "site-packages" / "running_environment.pth"
    added.write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", making / "bin" / "python", "install"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    try:
        subprocess.run([*pip, *quiet, f"transformers=={version}"], check=True)
        making.rename(environment)
    except OSError:
        # Another process was faster.
        if not python.exists():
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return python
