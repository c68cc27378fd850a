"""LoRA runs: under both engines, on two ranks, resumed once; only adapters are trained and saved, and they come out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.lora import Adapter
from models.pipeline_folder import PipelineFolder
from models.pretrained import load
from tests.models import tiny_pipelines
from tests.trainer.jobs import QUICK, train_on
from tools import cli
from tools.demo.scenes import write_tars
from trainer.checkpoint.weights import saved_shapes
from trainer.loading import load_model, merge_adapters

KINDS = {"sd1": tiny_pipelines.sd1, "sd3": tiny_pipelines.sd3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    def imported(kind: str) -> Callable[[Path], Path]:
        def make(at: Path) -> Path:
            KINDS[kind](at)
            assert cli.execute(["import", f"source={at}/{kind}", "name=base", f"runs={at}"]) == 0
            return at / "base"

        return make

    return tiny_pipelines.made_once({kind: imported(kind) for kind in KINDS}, tmp_path_factory)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(run, ema="none").networks["denoiser"].state_dict())


@pytest.mark.parametrize(
    "kind, engine",
    [("sd1", "fsdp"), ("sd3", "fsdp"), ("sd1", "deepspeed"), ("sd3", "deepspeed engine.stage=3")],
)
def test_adapters_are_trained_on_two_ranks_and_resumed(kind, engine, made, tmp_path):
    base = made(kind)
    write_tars(tmp_path / "scenes", 20, seed=0)
    shared = [f"experiment={base}/experiment.yaml", "adapter=lora", "adapter.rank=2", "batch=4", "lanes=2"]
    shared += [f"data.sources.scenes.shards={tmp_path}/scenes", "buckets=square", "buckets.size=16"]
    shared += ["schedule.lr=0.01", "schedule.warmup=0", "ema=constant"]
    where = [f"engine={engine.split()[0]}", *engine.split()[1:]]
    train_on(1, tmp_path, "name=whole", *shared, "engine=fsdp", "steps=4", small=QUICK)
    train_on(2, tmp_path, "name=split", *shared, *where, "steps=2", small=QUICK)
    train_on(2, tmp_path, "name=split", *shared, *where, "steps=4", small=QUICK)

    runs = tmp_path / "runs"
    whole, split, start = weights(runs / "whole"), weights(runs / "split"), load(base / PipelineFolder(base).denoiser)
    moved = 0.0
    for name, tensor in start.state_dict().items():
        change, same = split[name] - tensor, torch.equal(whole[name], tensor)
        moved += float(change.abs().sum())
        assert same == torch.equal(split[name], tensor), name
        torch.testing.assert_close(split[name], whole[name], rtol=1e-3, atol=1e-4)
    assert moved > 0
    (saved,) = (runs / "split" / "checkpoints").glob("step_00000004")
    assert all("lora_" in name for name in saved_shapes(saved))
    assert any(name.startswith("ema.") for name in saved_shapes(saved))

    # The adapters alone, and with the weights that they are for.
    command = ["export", f"source={runs}/split", "average=none"]
    assert cli.execute([*command, f"out={tmp_path}/adapters"]) == 0
    network = load(base / PipelineFolder(base).denoiser)
    Adapter.load(tmp_path / "adapters").merge_into(network)
    assert cli.execute([*command, f"out={tmp_path}/merged", "merge=true"]) == 0
    merged = load(tmp_path / "merged" / PipelineFolder(base).denoiser)
    for name, tensor in split.items():
        torch.testing.assert_close(network.state_dict()[name], tensor)
        torch.testing.assert_close(merged.state_dict()[name], tensor)
    drawn = ["prompts=[a red circle]", "sampler.steps=2"]
    for out, more in [
        ("a", [f"source={runs}/split", "average=none"]),
        ("b", [f"source={base}", f"adapters=[{tmp_path}/adapters]"]),
    ]:
        assert cli.execute(["sample", *more, *drawn, "height=16", "width=16", f"out={tmp_path}/{out}"]) == 0
    from PIL import Image, ImageChops

    a, b = (Image.open(tmp_path / out / "00000.png") for out in "ab")
    assert max(high for _, high in ImageChops.difference(a, b).getextrema()) <= 1


@pytest.mark.parametrize(
    "kind, engine",
    [
        ("sd1", "fsdp"),
        pytest.param("sd3", "fsdp", marks=pytest.mark.slow),
        pytest.param("sd1", "deepspeed", marks=pytest.mark.slow),
        ("sd3", "deepspeed engine.stage=3"),
    ],
)
def test_text_encoders_are_adapted_with_the_denoiser(kind, engine, made, tmp_path):
    base = made(kind)
    write_tars(tmp_path / "scenes", 20, seed=0)
    shared = [f"experiment={base}/experiment.yaml", "adapter=lora", "adapter.rank=2", "batch=4", "lanes=2"]
    shared += ["adapter.text_targets=[q_proj,fc1]", "objective.train_conditioner=true", "ema=constant"]
    shared += [f"data.sources.scenes.shards={tmp_path}/scenes", "buckets=square", "buckets.size=16"]
    shared += ["schedule.lr=0.01", "schedule.warmup=0"]
    where = [f"engine={engine.split()[0]}", *engine.split()[1:]]
    train_on(1, tmp_path, "name=whole", *shared, "engine=fsdp", "steps=4", small=QUICK)
    train_on(2, tmp_path, "name=split", *shared, *where, "steps=2", small=QUICK)
    train_on(2, tmp_path, "name=split", *shared, *where, "steps=4", small=QUICK)

    def texts(source: Path) -> dict[str, torch.Tensor]:
        return dict(load_model(source, ema="none").networks["conditioner"].state_dict())

    runs = tmp_path / "runs"
    whole, split, start = texts(runs / "whole"), texts(runs / "split"), texts(base)
    changed = {name for name in start if not torch.equal(split[name], start[name])}
    assert changed and all(name.endswith(("q_proj.weight", "fc1.weight")) for name in changed)
    assert len({name.split(".")[1] for name in changed}) == (1 if kind == "sd1" else 2)
    for name in start:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-3, atol=1e-4)

    command = ["export", f"source={runs}/split", "average=none"]
    assert cli.execute([*command, f"out={tmp_path}/adapters"]) == 0
    adapted = load_model(base)
    merge_adapters(tmp_path / "adapters", adapted)
    assert cli.execute([*command, f"out={tmp_path}/merged", "merge=true"]) == 0
    merged = texts(tmp_path / "merged")
    for name, tensor in split.items():
        torch.testing.assert_close(adapted.networks["conditioner"].state_dict()[name], tensor)
        torch.testing.assert_close(merged[name], tensor)


def test_embeddings_of_encoders_that_are_adapted_are_not_kept(made, tmp_path, capsys):
    write_tars(tmp_path / "scenes", 8, seed=0)
    shared = [f"experiment={made('sd1')}/experiment.yaml", f"data.sources.scenes.shards={tmp_path}/scenes", *QUICK]
    shared += ["buckets=square", "buckets.size=16", "data.crop=center", "batch=4", "lanes=2", "steps=1", "ema=none"]
    shared += [f"runs={tmp_path}/runs", "adapter=lora"]
    text = ["adapter.text_targets=[q_proj]", "objective.train_conditioner=true"]
    assert cli.execute(["encode", *shared, *text, "data.encoded=latents"]) == 0
    assert cli.execute(["encode", *shared, "data.encoded=both"]) == 0
    for name, status in (("latents", 0), ("both", 1)):
        assert cli.execute(["train", *shared, *text, f"data.encoded={name}", f"name={name}"]) == status
    assert "trains adapters of them" in capsys.readouterr().err


def test_bf16_adapts_weights_in_bf16(made, tmp_path):
    base = made("sd3")
    write_tars(tmp_path / "scenes", 20, seed=0)
    shared = [f"experiment={base}/experiment.yaml", "adapter=lora", "adapter.rank=2", "batch=4", "lanes=2", "steps=2"]
    shared += [f"data.sources.scenes.shards={tmp_path}/scenes", "buckets=square", "buckets.size=16", "ema=none"]
    for engine in ("fsdp", "deepspeed"):
        rows = train_on(
            1, tmp_path, f"name={engine}", *shared, f"engine={engine}", "engine.precision=bf16", small=QUICK
        )
        assert all(row["grad_norm"] > 0 for row in rows)


def test_what_cannot_be_adapted_is_named(made, tmp_path, capsys):
    base = made("sd1")
    write_tars(tmp_path / "scenes", 4, seed=0)
    train = ["train", f"data.sources.scenes.shards={tmp_path}/scenes", f"runs={tmp_path}/runs", "adapter=lora"]
    experiment = f"experiment={base}/experiment.yaml"
    for more, named in [
        (["name=a"], "adapter.base"),
        (["name=b", experiment, "adapter.base=/nowhere"], "no diffusers folder"),
        (["name=c", experiment, "adapter.targets=[nothing]", "buckets=square", "buckets.size=16"], "adapter.targets"),
        (["name=d", experiment, "adapter.text_targets=[q_proj]"], "objective.train_conditioner=true"),
        (["name=e", experiment, "conditioner=unconditional", "adapter.text_targets=[q_proj]"], "no CLIP text encoder"),
    ]:
        assert cli.execute([*train, *more]) == 2
        assert named in capsys.readouterr().err
