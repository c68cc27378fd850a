"""The study files: each composes, and SD3's studies have the runs that the paper states."""

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.compose import ROOT, compose
from conf.schema import build, check
from tools.study.job import Config, compose_study
from trainer.evaluate import Config as EvaluateConfig
from trainer.evaluate import preflight

PATHS = {
    "sd3/formulations": [f"study.paths.{name}=/{name}" for name in ("imagenet", "cc12m", "coco", "vae")],
    "sd3/depth": ["study.paths.images=/i", "study.paths.vae=/v"],
}
FILES = sorted(path.relative_to(ROOT / "study").with_suffix("").as_posix() for path in (ROOT / "study").rglob("*.yaml"))


def composed(name: str, *overrides: str):
    config = compose("study", [f"study={name}", *PATHS.get(name, []), *overrides])
    check(config, Config)
    return compose_study(config, here=False)


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("scaling_small", "sd3/formulations")])
def test_every_run_of_every_study_composes(name):
    study, runs = composed(name, "runs=/nowhere", "study.seeds=[0]")
    assert len(runs) == len(study.points()) > 1
    assert all(run.cost.flops > 0 for run in runs)


@pytest.mark.slow
def test_the_61_formulations_are_those_of_the_paper():
    study, runs = composed("sd3/formulations", "+study.leave_out=[{dataset: [cc12m]}]", "runs=/nowhere")
    kinds = Counter()
    for run in runs:
        process = run.config.process
        kind = "_".join(
            node._target_.rpartition(".")[2]
            for node in (process.path, process.parameterization, process.density, process.weight)
        )
        kinds[kind] += 1
        build(process)
    plain = "Uniform_Unweighted"
    assert kinds == {
        # 4: noise and v on LDM's linear and the cosine path
        **dict.fromkeys((f"{p}_{t}_{plain}" for p in ("ScaledLinear", "Cosine") for t in ("Noise", "V")), 1),
        # 9: heavy-tailed times, one of them uniform
        "RectifiedFlow_Velocity_Mode_Unweighted": 8,
        f"RectifiedFlow_Velocity_{plain}": 1,
        "RectifiedFlow_Velocity_LogitNormal_Unweighted": 30,
        "RectifiedFlow_Velocity_CosMap_Unweighted": 1,
        f"EDM_EDMPreconditioning_{plain}": 15,
        # 2: edm/rf and edm/cos
        "VarianceExploding_EDMPreconditioning_Uniform_MeasuredAs": 2,
    }
    assert len(runs) == 61 and len(study.points()) == 61
    configs = {str(run.config.process) for run in runs}
    assert len(configs) == 61
    assert {(run.config.batch, run.config.schedule.lr, run.config.schedule.warmup) for run in runs} == {
        (1024, 1e-4, 1000)
    }
    by_label = {run.point.labels["formulation"]: run.config.process for run in runs}
    assert by_label["rf_mode_1.29"].density.scale == pytest.approx(-1 + 2.75 * 5 / 6, rel=1e-5)
    assert by_label["rf_lognorm_-0.5_1.0"].density == {
        "_target_": "models.densities.LogitNormal",
        "mean": -0.5,
        "std": 1.0,
    }
    path = by_label["edm_-1.2_1.2"].path
    assert (path.p_mean, path.p_std) == (-1.2, 1.2)


def test_formulations_are_ranked_over_the_papers_settings():
    study = build(compose("study", ["study=sd3/formulations", *PATHS["sd3/formulations"]]).study)
    commands = study.evaluate.commands(Path("/nowhere/sd3_formulations/rf_imagenet_seed0"))
    settings = Counter()
    for command in commands:
        config = compose("evaluate", command)
        check(config, EvaluateConfig)
        preflight(OmegaConf.merge(config, {"reference": None}), 8)
        assert (config.samples, config.reference, sorted(config.metric)) == (1000, "/coco", ["clip_fid", "clip_score"])
        settings.update(product(config.steps, config.guidance_scales, config.averages))
    samplers = [(50, 1.0), (50, 2.5), (50, 5.0), (5, 5.0), (10, 5.0), (25, 5.0)]
    assert settings == {(*sampler, average): 1 for sampler in samplers for average in ("none", "decay_99")}
    assert set(study.columns()) >= {"clip", "fid"}
    assert (study.analyses["ranks"].higher, study.analyses["ranks"].lower) == ("clip", "fid")


def test_the_depths_have_the_papers_sizes():
    _, runs = composed("sd3/depth", "runs=/nowhere")
    sizes = {run.config.model.num_layers: run.cost.parameters / 1e9 for run in runs}
    assert sizes == {
        depth: pytest.approx(b, abs=0.05) for depth, b in {15: 0.5, 18: 0.86, 21: 1.37, 30: 3.98, 38: 8.09}.items()
    }
    assert [run.point.name for run in runs if run.point.held_out] == ["d38_seed0"]
    assert {(run.config.batch, run.config.steps) for run in runs} == {(4096, 500_000)}


def test_the_small_scaling_study_has_what_was_asked_of_it():
    study, runs = composed("scaling_small", "runs=/nowhere")
    fitted = [run for run in runs if not run.point.held_out]
    held_out = [run for run in runs if run.point.held_out]
    assert len({run.point.labels["width"] for run in fitted}) >= 6 and len(study.seeds) == 3
    assert len(fitted) == 3 * len({run.point.labels["width"] for run in fitted})
    flops = [run.cost.flops for run in fitted]
    predicted = min(run.cost.flops for run in held_out)
    assert max(flops) / min(flops) >= 100  # two decades of compute
    assert predicted > 2 * max(flops)
    # One epoch: no scene is seen twice.
    assert study.prepare.count * (1 - runs[0].config.data.holdout) * 0.99 > max(run.cost.samples for run in runs)
    assert study.analyses["compute"].level == 0.9 and study.analyses["compute"].widest == 0.03
