"""What a submitted job keeps, so that later edits change nothing of it: its command, config, code and versions."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.secrets import without_secrets

_ROOT = Path(__file__).parent.parent
_PACKAGES = ("conf", "data", "models", "slurm", "tools", "trainer")


def keep_command(folder: Path, job: str, overrides: Sequence[str], config: DictConfig) -> None:
    """Write `command.json`, and `config.yaml` with secrets masked."""
    folder.mkdir(parents=True)
    (folder / "command.json").write_text(json.dumps({"job": job, "overrides": list(overrides)}, indent=1) + "\n")
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(without_secrets(OmegaConf.to_container(config))))


def keep_code(folder: Path) -> Path:
    """Copy our packages into `code`, which is returned, and write `version.json`: the commit, and what is installed.

    `code.diff` is what the working copy has beyond that commit. Installed packages are named, not copied.
    """
    code = folder / "code"
    for package in _PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(_ROOT / package, code / package, ignore=ignored)
    (folder / "version.json").write_text(json.dumps(_versions(), indent=1) + "\n")
    if difference := _git("diff", "HEAD"):
        (folder / "code.diff").write_text(difference)
    return code


def _versions() -> dict[str, Any]:
    installed = {package.metadata["Name"]: package.version for package in metadata.distributions()}
    commit = _git("rev-parse", "HEAD")
    return {"commit": commit and commit.strip(), "python": sys.version, "packages": dict(sorted(installed.items()))}


def _git(*words: str) -> str | None:
    """What git says of the code; None where it is no working copy, or there is no git."""
    if not (_ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None
