"""A plain install holds everything, configs included, and works from any folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_alone_runs_from_another_folder(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    # A copy, since the build writes into its source folder.
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", *_sources(), str(_made(source))], check=True, cwd=ROOT)
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("millrace-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.startswith("conf/experiment/") for name in archive.namelist())
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r});"
        "import tools.cli, conf; print(conf.__file__);"
        "assert tools.cli.execute(['train', '--cfg', 'experiment=emoji', 'scale=tiny', 'steps=7']) == 0"
    )
    elsewhere = _made(tmp_path / "elsewhere")
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=elsewhere, check=True, capture_output=True, text=True
    )
    assert result.stdout.startswith(str(tmp_path / "site"))
    assert "steps: 7" in result.stdout


def _sources() -> list[str]:
    return ["pyproject.toml", "README.md", "conf", "data", "models", "slurm", "tools", "trainer"]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
