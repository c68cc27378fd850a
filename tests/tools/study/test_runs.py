"""Runs that lie in a study's folder: which of them are the study's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from conf.compose import compose
from conf.errors import ConfigError
from tests.tools.study.test_job import arguments
from tools.study.job import compose_study


def again(folder: Path, change: Callable[[Any], None], *overrides: str) -> None:
    """Compose a study whose first run's folder holds a configuration that was changed since."""
    config = compose("study", arguments(folder, "old", *overrides)[1:])
    run = compose_study(config)[1][0]
    stored = json.loads(json.dumps(OmegaConf.to_container(run.config)))
    change(stored)
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(stored))
    compose_study(config)


def test_keys_that_are_new_since_a_run_was_made_do_not_count_at_their_default(tmp_path):
    def older(stored: Any) -> None:
        del stored["data"]["fields"]  # {} in the file, None in the constructor
        del stored["data"]["max_pixels"]  # a constructor's default
        del stored["process"]["density"]["mean"]
        del stored["patience"], stored["validation"]["ema"], stored["adapter"]  # the job's own defaults
        stored["networks"] = None

    again(tmp_path, older)


@pytest.mark.parametrize(
    ("key", "value"), [("patience", 11), ("data.max_pixels", 500), ("data.sources.scenes.weight", 2.0)]
)
def test_a_new_key_that_is_set_to_something_else_counts(tmp_path, key, value):
    *path, last = key.split(".")

    def older(stored: Any) -> None:
        for name in path:
            stored = stored[name]
        del stored[last]

    with pytest.raises(ConfigError, match=rf"holds a run with {key}=\S+, but the study has {value} now"):
        again(tmp_path, older, f"overrides={key}={value}")


def test_a_key_of_other_value_counts_also_where_it_is_the_default_now(tmp_path):
    def older(stored: Any) -> None:
        stored["data"]["max_pixels"] = 500

    with pytest.raises(ConfigError, match=r"data\.max_pixels=500, but the study has 100000000 now"):
        again(tmp_path, older)
