"""Libraries that cannot live in this environment, for what they pin or pull in: in a folder of their own, to be asked
by scripts that run beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def install(folder: Path, *requirements: str) -> Path:
    """Install packages into a folder, without what they depend on; skips the test where there are none to be had."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {' '.join(requirements)} here: {done.stderr.strip().splitlines()[-1]}")
    return folder


def ask(folder: Path, script: str, *arguments: str) -> Any:
    """What a script that sees the folder's packages prints at last, as JSON."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-P", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
