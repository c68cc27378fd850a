"""The floors of the house: imports run downward only, and the command line stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# conf/ holds the configs and what reads them: a leaf, which jobs in any room may use.
BELOW = {
    "models": set(),
    "data": {"models", "conf"},
    "trainer": {"data", "models", "conf"},
    "slurm": set(),
    "conf": set(),
    "tools": {"trainer", "data", "models", "slurm", "conf"},
}
OURS = set(BELOW)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(BELOW))
def test_imports_run_downward_only(package):
    for path in (ROOT / package).rglob("*.py"):
        wrong = imported(path) & OURS - BELOW[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_nothing_imports_what_fails_beside_the_cpu_build():
    for package in BELOW:
        for path in (ROOT / package).rglob("*.py"):
            wrong = imported(path) & {"torchvision", "timm", "open_clip"}
            assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_command_line_imports_nothing_heavy():
    code = (
        "import sys; from tools.cli import execute; execute(['--help']); execute(['train', '--help']);"
        "print([m for m in ('torch', 'duckdb', 'pyarrow', 'transformers', 'wandb', 'deepspeed') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
