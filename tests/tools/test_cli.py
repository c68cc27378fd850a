"""The command line: help, mistakes in one sentence, ranks."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from omegaconf import OmegaConf

from conf.compose import ROOT, compose
from conf.errors import ConfigError
from conf.schema import check
from tools import cli


def one_sentence(capsys, *arguments: str) -> str:
    """What a wrong command line prints: one line on stderr, and status 2."""
    assert cli.execute(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


def test_help_lists_the_jobs(capsys):
    assert cli.execute(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(job in printed for job in cli.JOBS)


@pytest.mark.parametrize("job", sorted(cli.JOBS))
def test_help_of_a_job_shows_its_keys_and_choices(job, capsys):
    assert cli.execute([job, "--help"]) == 0
    assert f"conf/{job}.yaml" in capsys.readouterr().out


def test_help_of_train_names_groups_and_choices(capsys):
    cli.execute(["train", "--help"])
    printed = capsys.readouterr().out
    assert "engine" in printed and "deepspeed, fsdp, hsdp" in printed and "global" not in printed.split("groups")[0]
    rows = dict(line.split(maxsplit=1) for line in printed.splitlines() if line.startswith("  process"))
    assert rows["process/density"] == "cosmap, logit_normal, mode, steps, uniform"
    assert "v_cosine" in rows["process"] and "density" not in rows["process"]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("study scaling_small", "name: scaling_small"),
        ("study sd3/depth study.paths.images=a study.paths.vae=b", "name: sd3_depth"),
        ("bench plan", "_target_: tools.bench.plan.run"),
        ("logs first", "run: first"),
        ("cancel first", "run: first"),
    ],
)
def test_a_bare_word_is_what_the_job_is_about(line, shown, capsys):
    assert cli.execute([*line.split(), "--cfg"]) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trian"], ["'trian'", "train"]),
        (["train", "stpes=3"], ["'stpes'", "did you mean 'steps'"]),
        (["train", "model.num_layer=3"], ["'model.num_layer'", "model.num_layers"]),
        (["train", "engine=fdsp"], ["'engine'", "'fdsp'", "fsdp"]),
        (["train", "experiment=nowhere"], ["experiment", "nowhere"]),
        (["train", "steps=many"], ["steps", "'many'", "integer"]),
        (["train", "model.num_layers=three"], ["model.num_layers", "'three'", "integer"]),
        (["train", "+model.depth=3"], ["'model.depth'", "MMDiT"]),
        (["train", "process.density._target_=models.densities.Nowhere"], ["process.density._target_", "Nowhere"]),
        (["train", "engine.precision=fp7"], ["engine.precision", "fp7"]),
        (["train", "log.every=often"], ["log", "every"]),
        (["train", "steps=[1"], ["steps='[1'", "integer"]),
        (["train", "steps"], ["'steps'", "key=value"]),
        (["train", "process=density/uniform"], ["'process'", "'density/uniform'", "rectified_flow"]),
        (["train", "guidance=null"], ["'guidance'", "cfg, none"]),
        (["train", "ema.lengths.power_005.sigma_rel=0.1"], ["ema.lengths.power_005"]),
        (["train", "process/density=unifrom"], ["'process/density'", "did you mean 'uniform'"]),
        (["train", "sampler._target_=models.guidance.Guidance"], ["sampler._target_", "Guidance", "no Sampler"]),
        (["train", "process.density._target_=models.weighting.Unweighted"], ["process.density._target_", "no Density"]),
        (["train", "~process", "+process.density=3"], ["process", "no Process", "no _target_"]),
        (["train", "ema.lengths={0.9: {_target_: trainer.ema.ConstantDecay, decay: 0.9}}"], ["0.9", "quotes"]),
        (["train", "cluster.processes=0"], ["cluster.processes=0", "out of range"]),
        (["train", "cluster.restarts=-1"], ["cluster.restarts=-1", "out of range"]),
        (["train", "cluster.proceses=2"], ["cluster.proceses"]),
        (["train", "threads=0"], ["threads=0", "out of range"]),
        (["train", "device=gpu"], ["device='gpu'", "'cuda'"]),
        (["train", "init_from={pth: x}"], ["init_from.pth", "path, ema, networks"]),
        (["train", "init_from={ema: x}"], ["init_from.path", "missing"]),
        (["train", "init_from=3"], ["init_from=3"]),
        (["train", "log.wandb.projct=x"], ["log.wandb.projct", "project"]),
        (["train", "log.wandb.mode=foo"], ["log.wandb.mode='foo'", "'offline'"]),
        (["sample", "source=x", "each=0"], ["each=0", "out of range"]),
        (["train", "guidance=own"], ["guidance", "OwnGuidance"]),
        (
            ["train", "experiment=rdm/imagenet", "+field@data.fields.neighbours=neighbour_captions"],
            ["'field@data.fields.neighbours'", "without the +"],
        ),
        (["index", "shards=x", "processes=0"], ["processes=0", "out of range"]),
        (["bench", "plan", "rows=5"], ["'rows'", "did you mean 'bench.rows'"]),
        (["bench", "plan", "bench.rowz=5"], ["'bench.rowz'", "did you mean 'bench.rows'"]),
        (["bench"], ["'bench'"]),
        (["train", "hydra.run.dir=/tmp"], ["hydra.run.dir", "Hydra"]),
        (["train", "scale=tiny", "hydra.run.dir=/tmp"], ["hydra.run.dir", "Hydra"]),
        (["train", "scale=tiny", "data.sources.a.shards=/x", "data.sources.a=3"], ["data.sources.a=3", "Source"]),
        (["train", "=3"], ["'=3'", "key=value"]),
        (["train", "--config-name=foo"], ["'--config-name=foo'", "key=value"]),
        (["train", "data.sources=[a]"], ["'data.sources=[a]' does not fit"]),
        (["train", "steps=1,2"], ["steps=1,2", "several values", "steps=[1,2]"]),
        (
            ["train", "experiment=emoji", "conditioner=none"],
            ["Set model.joint_attention_dim itself", "conditioner.width"],
        ),
        (
            ["train", "data.sources.a.shards=[${oc.env:MILLRACE_NOT_SET}]"],
            ["'data.sources.a.shards'", "MILLRACE_NOT_SET"],
        ),
        (["train", "engine=3"], ["'engine'", "'3'", "fsdp"]),
        (["train", "process=edm", "+process.density.mean=3"], ["process.density.mean", "takes low, high"]),
        (["train", "experiment=demo/scenes", "engine=deepspeed", "engine.reshard_after_forward=true"], ["reshard"]),
        (["train", "experiment=demo/scenes", "process=edm", "process.density.mean=0.5"], ["process.density.mean"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(arguments, named, capsys):
    sentence = one_sentence(capsys, *arguments)
    for part in named:
        assert part in sentence


EXPERIMENTS = sorted(
    path.relative_to(ROOT / "experiment").with_suffix("").as_posix() for path in (ROOT / "experiment").rglob("*.yaml")
)
SOURCE = "data.sources.photos.shards=/nowhere"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["data.sources.photos.shards="]),
        ([SOURCE, "data.holdout=1.0"], ["data.holdout=1.0", "below 1"]),
        ([SOURCE, "data.workers=-1"], ["data.workers=-1"]),
        ([SOURCE, "data.sources.photos.weight=0.0"], ["weight 0.0"]),
        ([SOURCE, "schedule.lr=-1.0"], ["schedule.lr=-1.0"]),
        ([SOURCE, "schedule.decay_from=1.5"], ["schedule.decay_from=1.5"]),
        ([SOURCE, "optimizer.betas=[0.9, 1.0]"], ["optimizer.betas"]),
        ([SOURCE, "optimizer.weight_decay=-0.1"], ["optimizer.weight_decay=-0.1"]),
        ([SOURCE, "sampler.steps=0"], ["sampler: ", "got 0"]),
        ([SOURCE, "process.density.std=-1.0"], ["process.density: ", "-1.0"]),
        ([SOURCE, "model.patch_size=0"], ["model: patch_size is 0"]),
        ([SOURCE, "conditioner.heads=0"], ["conditioner.heads=0"]),
        ([SOURCE, "engine=deepspeed", "engine.bucket_elements=0"], ["engine.bucket_elements=0"]),
        ([SOURCE, "engine.shard_frozen=[teacher]"], ["engine.shard_frozen names ['teacher']", "conditioner"]),
        ([SOURCE, "objective.caption_dropout=[0.1, 1.5]"], ["objective.caption_dropout", "1.5"]),
        ([SOURCE, "batch=12", "lanes=5"], ["5 lanes", "[1, 2, 3, 4, 6, 12]"]),
        ([SOURCE, "batch=8", "lanes=4", "cluster.processes=3"], ["3 data-parallel ranks", "[1, 2, 4]"]),
        ([SOURCE, "batch=8", "lanes=2", "pass_size=3"], ["pass_size=3", "slice of 4"]),
        ([SOURCE, "engine=hsdp"], ["engine.replicas=2", "1 ranks"]),
        ([SOURCE, "validation.ema=0.5"], ["validation.ema='0.5'", "decay_9999"]),
        ([SOURCE, "samples.ema=decay_9999", "ema=none"], ["samples.ema='decay_9999'", "none"]),
        ([SOURCE, "++ema.lengths={v0.9: {_target_: trainer.ema.ConstantDecay, decay: 0.9}}"], ["'v0.9'", "no dot"]),
        ([SOURCE, "objective.caption_dropout=[0.1, 0.2]"], ["caption_dropout has 2 numbers for 1 enc"]),
        (
            [SOURCE, "conditioner=sd3", "model=sd3_medium", "objective.caption_dropout=[0.1, 0.2]"],
            ["caption_dropout has 2 numbers for 3 enc"],
        ),
        ([SOURCE, "guidance.scale=-1"], ["guidance.scale=-1"]),
        (
            [SOURCE, "schedule=by_phase", "+schedule@schedule.denoise=constant", "schedule.denoise.lr=-1.0"],
            ["millrace: schedule.denoise.lr=-1.0: it must"],
        ),
        (
            [SOURCE, "optimizer=by_phase", "+optimizer@optimizer.denoise=adamw", "optimizer.denoise.eps=0.0"],
            ["millrace: optimizer.denoise.eps=0.0: it must"],
        ),
        ([SOURCE, "name="], ["name=''"]),
        ([SOURCE, "name=../x"], ["name='../x'"]),
        ([SOURCE, "name=/tmp/x"], ["name='/tmp/x'"]),
        ([SOURCE, "name=.", "cluster.processes=2"], ["name='.'"]),
        ([SOURCE, "model.in_channels=16"], ["model.in_channels is 16", "first stage gives 3"]),
        ([SOURCE, "conditioner.width=64"], ["model.joint_attention_dim is 128", "conditioner gives 64"]),
        ([SOURCE, "buckets.size=250"], ["250x250", "multiples of 8"]),
        ([SOURCE, "buckets.size=1024"], ["1024x1024", "at most 512"]),
        (
            [SOURCE, "scale=tiny", "first_stage=kl_tiny", "buckets=square", "buckets.size=33"],
            ["33x33", "multiple of 2"],
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_read_or_written(arguments, named, capsys, tmp_path):
    sentence = one_sentence(capsys, "train", f"runs={tmp_path}/runs", *arguments)
    for part in named:
        assert part in sentence
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told_by_its_key(monkeypatch, tmp_path):
    from data.run_directory import RunDirectory
    from data.store import StoreError
    from data.tars import Source, TarData
    from tools.demo.scenes import write_tars
    from tools.launch import launch

    with pytest.raises(ValueError, match="runs=/proc/nope"):
        RunDirectory("/proc/nope", "x")
    with pytest.raises(ConfigError, match="runs=/proc/nope"):
        launch("train", [], compose("train", ["runs=/proc/nope", "cluster.processes=2"]))
    write_tars(tmp_path / "scenes", 1, seed=0)
    with pytest.raises(StoreError, match=r"data\.cache_folder=/proc/x"):
        TarData({"a": Source(str(tmp_path / "scenes"))}, cache_folder="/proc/x").select("a", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(capsys):
    assert "device=cuda" in one_sentence(capsys, "train", SOURCE, "device=cuda")


def test_a_name_that_leads_elsewhere_is_refused_before_ranks_write_logs(capsys, tmp_path):
    arguments = ["sample", "source=x", f"runs={tmp_path}/runs", "name=../x", "cluster.processes=2"]
    assert "name='../x'" in one_sentence(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_the_defaults_fit_each_other():
    from trainer.config import preflight

    preflight(compose("train", [SOURCE]), ranks=1)


@pytest.mark.parametrize(
    "first_stage",
    ["identity", "kl_tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kl_sd3", "kl_sdxl"))],
)
def test_tiny_fits_any_first_stage(first_stage):
    from trainer.config import preflight

    for experiment in sorted(set(EXPERIMENTS) - {"rdm/rarm"}):  # which reads codes
        preflight(compose("train", ["scale=tiny", f"first_stage={first_stage}", f"experiment={experiment}", SOURCE]), 1)


@pytest.mark.parametrize("scale", ["full", "tiny"])
@pytest.mark.parametrize(
    ("chosen", "stays", "falls"),
    [
        (["engine=deepspeed"], {"engine.precision": "fp32"}, "engine.reshard_after_forward"),
        (["process=edm"], {"process.path.p_mean": -1.2}, "process.density.mean"),
        (["process/density=cosmap"], {"process.density._target_": "models.densities.CosMap"}, "process.density.std"),
        (
            ["optimizer=by_phase", "+optimizer@optimizer.denoise=adamw"],
            {"optimizer.denoise.eps": 1e-8},
            "optimizer.betas",
        ),
        (
            ["schedule=by_phase", "+schedule@schedule.denoise=cosine"],
            {"schedule.denoise.decay": "cosine"},
            "schedule.lr",
        ),
        (["schedule=cosine"], {"schedule.lr": 3e-3}, "schedule.denoise"),
        (["buckets=square", "buckets.size=48"], {"buckets.size": 48}, "buckets.sizes"),
        (["cluster=local"], {"cluster.restarts": 0}, "cluster.tasks"),
    ],
)
def test_an_experiments_values_for_another_class_fall_away(chosen, stays, falls, scale):
    from trainer.config import preflight
    from trainer.train import Config

    config = compose("train", ["experiment=demo/scenes", f"scale={scale}", SOURCE, *chosen])
    check(config, Config)
    preflight(config, ranks=1)
    assert {key: OmegaConf.select(config, key) for key in stays} == stays
    assert OmegaConf.select(config, falls) is None


@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_so_they_do_where_a_choice_goes_elsewhere(scale):
    """A field that an experiment chooses: what it sets of it stays as far as the field's own class takes it."""
    of = ["experiment=rdm/text_768", f"scale={scale}", SOURCE, *["first_stage.folder=/x"] * (scale == "full")]
    chosen = ["field@data.fields.neighbours=neighbour_captions", "+where@data.sources.photos=imagenet_dogs"]
    before, after = (compose("train", [*of, *more]) for more in ([], chosen))
    assert before.data.fields.neighbours.query is True
    assert after.data.fields.neighbours == {
        "_target_": "data.retrieval.field.NeighbourCaptions",
        "database": "openimages",
        "k": 11,
        "column": "neighbours",
        "most_similar": None,
    }
    captions = compose("train", [*of, *chosen, "conditioner=neighbour_captions"]).conditioner
    assert captions.encoders[0]._target_ == "models.each.EachEncoder" or scale == "tiny"
    assert before.conditioner.encoders[0].k == 11
    assert after.data.sources.photos.shards == before.data.sources.photos.shards


def test_a_clause_that_is_chosen_takes_nothing_from_its_source(tmp_path):
    (tmp_path / "own.yaml").write_text("data: {sources: {photos: {shards: /nowhere, weight: 2.0}}}\n")
    choice = "+where@data.sources.photos=imagenet_dogs"
    config = compose("train", [f"experiment={tmp_path}/own.yaml", "scale=tiny", choice])
    assert (config.data.sources.photos.shards, config.data.sources.photos.weight) == ("/nowhere", 2.0)
    assert "label" in config.data.sources.photos.where


def test_tiny_gives_buckets_that_the_command_line_may_change():
    config = compose("train", ["experiment=sd3/medium_1024", "scale=tiny", "buckets.sizes=[[64, 64]]"])
    assert config.buckets == {"_target_": "data.buckets.BucketList", "sizes": [[64, 64]]}


def test_the_last_of_several_values_counts_at_any_scale():
    for scale in ("full", "tiny"):
        config = compose("train", [f"scale={scale}", "log.wandb=null", "log.wandb.mode=offline", "steps=5", "steps=6"])
        assert (config.log.wandb, config.steps) == ({"mode": "offline"}, 6)


def test_a_name_may_look_like_a_number():
    config = compose("train", ["samples.ema=0.9999", "validation.ema=0.10", "name=7"])
    assert (config.samples.ema, config.validation.ema, config.name) == ("0.9999", "0.10", "7")
    assert compose("train", ["samples.ema=null"]).samples.ema is None
    assert compose("train", ["init_from.path=x", "init_from.ema=0.50"]).init_from == {"path": "x", "ema": "0.50"}


def test_a_clause_needs_no_quotes_of_hydras():
    clause = r"width > 64 and caption <> 'it''s' and regexp_matches(caption, '^\d+$')"
    assert compose("train", [f"data.sources.a.where={clause}"]).data.sources.a.where == clause


def test_averages_are_set_from_the_command_line():
    power = compose("train", ["ema=power", "ema.lengths.power_005.sigma_rel=0.07"])
    assert {name: node.sigma_rel for name, node in power.ema.lengths.items()} == {"power_005": 0.07, "power_010": 0.10}
    emoji = compose("train", ["experiment=emoji", "ema.lengths.decay_9999.decay=0.5"])
    assert (
        emoji.ema.lengths == {emoji.samples.ema: emoji.ema.lengths.decay_9999}
        and emoji.ema.lengths.decay_9999.decay == 0.5
    )


def test_tiny_shrinks_by_class_below_the_command_line():
    tiny = compose("train", ["model=sd35_medium", "scale=tiny"])
    assert tiny.model.num_layers < 24
    own = compose("train", ["model=sd35_medium", "scale=tiny", "model.num_layers=7", "model.dual_attention_layers=[6]"])
    assert own.model.num_layers == 7
    assert own.model.attention_head_dim == tiny.model.attention_head_dim


@pytest.mark.parametrize("scale", ["full", "tiny"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_passes_the_check(experiment, scale):
    from trainer.train import Config

    needed = (
        ["first_stage.folder=/vae"] if experiment.startswith(("sd3", "sdxl", "ldm", "rdm")) and scale == "full" else []
    )
    if "autoencoder" in experiment and scale == "full":
        needed = ["networks.lpips.vgg=/vgg16.pth", "networks.lpips.linear=/lpips.pth"]
    config = compose("train", [f"experiment={experiment}", f"scale={scale}", *needed])
    check(config, Config)
    assert ("shrink" in config) == (scale == "tiny")
    assert config.batch == 8 or scale == "full"


BENCHMARKS = [f"bench={path.stem}" for path in sorted((ROOT / "bench").glob("*.yaml"))]


@pytest.mark.parametrize(
    ("job", "needed"),
    [
        ("index", "shards=x"),
        ("curate", "shards=x"),
        ("sample", "source=x"),
        ("export", "source=x out=y"),
        ("import", "source=x name=y"),
        ("evaluate", "metric=[fid,kid,clip_fid,precision_recall,clip_score,psnr,ssim,validation_loss,composition]"),
        *(("bench", benchmark) for benchmark in BENCHMARKS),
    ],
)
def test_every_job_passes_its_own_check(job, needed):
    check(compose(job, needed.split()), import_module(cli.JOBS[job].module).Config)


@pytest.mark.parametrize(
    "override",
    ["dry_run=no", "steps=2.0", "data.sources.a={shards: x, weihgt: 2}", "log.evry=3", "data.flip=off", "log.every=0"],
)
def test_a_value_of_nearly_the_right_type_is_refused(override, capsys):
    one_sentence(capsys, "train", override)


@pytest.mark.parametrize(
    "override",
    ["data.storage_options.s3=hunter2", "data.storage_options=hunter2", "data.sources.a=https://u:hunter2@h/x.tar"],
)
def test_a_secret_in_the_wrong_place_is_refused_without_being_told(override, capsys):
    sentence = one_sentence(capsys, "train", override)
    assert override.partition("=")[0] in sentence and "hunter2" not in sentence


def test_no_key_of_a_job_shares_the_name_of_a_group():
    groups = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for job in cli.JOBS:
        text = (ROOT / f"{job}.yaml").read_text()
        keys = {line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()}
        assert not keys & groups, job


def test_a_target_that_hydra_would_build_is_checked_before():
    from trainer.train import Config

    config = compose("train", [])
    check(config, Config)
    del config.checkpoint
    with pytest.raises(ConfigError, match="'checkpoint' is missing"):
        check(config, Config)


def test_works_from_any_folder_even_one_with_our_packages_names(tmp_path):
    for name in ("data", "models", "tools"):
        (tmp_path / name).mkdir()
    result = subprocess.run(
        [sys.executable, "-P", "-m", "tools.cli", "train", "--cfg", "steps=7"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        check=True,
    )
    assert "steps: 7" in result.stdout


@pytest.mark.slow
def test_the_same_command_joins_an_existing_torchrun(tmp_path):
    from tools.demo.scenes import write_tars

    write_tars(tmp_path / "scenes", 40, seed=0)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "tools.cli", "train", "scale=tiny", "name=joined", f"runs={tmp_path}/runs", "steps=2"),
            # Asked for again, these ranks are not started a second time.
            *("cluster.processes=2", "samples.every=null", "log.wandb=null"),
            *(f"data.sources.scenes.shards={tmp_path}/scenes", f"data.cache_folder={tmp_path}/cache"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len((tmp_path / "runs" / "joined" / "metrics.jsonl").read_text().splitlines()) == 2
    assert not list((tmp_path / "runs" / "joined" / "logs").iterdir())


def test_tiny_lets_what_is_trained_locally_stand_in_for_what_has_to_be_downloaded():
    local, learned = "models.text_training.CaptionConditioner", "models.conditioner.Conditioner"
    assert compose("train", ["experiment=sd3/medium_256", "scale=tiny"]).conditioner._target_ == local
    chosen = compose("train", ["experiment=sd3/medium_256", "scale=tiny", "conditioner=class_label"]).conditioner
    assert chosen._target_ == learned and chosen.encoders[0].width == 32 and "context_dim" not in chosen
    assert compose("train", ["conditioner=sd3"]).conditioner._target_ == learned
