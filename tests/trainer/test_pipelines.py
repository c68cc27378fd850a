"""Pipelines of diffusers in our hands: prompts, pictures, changed pictures and refined ones are those of diffusers' own
pipelines, on the same weights and noise."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from conf.schema import build
from models.given import Given
from models.guidance import Guidance
from models.pipeline_folder import PipelineFolder
from models.samplers import Course
from tests.models import tiny_pipelines
from tools import cli
from trainer import sample
from trainer.loading import Loaded, load_model
from trainer.pipelines import _CONDITIONERS, _guidance, config_of, process_node, sampler_node
from trainer.sample import guidance_of, sampler_of
from trainer.sampling import OwnGuidance, OwnSampler, Picture, SamplingDraws, decode, draw_latents, draw_pass

CAPTIONS = ["a red circle", "two blue squares"]
CPU = torch.device("cpu")
LINEAR = {"use_linear_projection": True, "attention_head_dim": [2, 4]}
KINDS: dict[str, tuple[Any, dict]] = {
    "sd1": (tiny_pipelines.sd1, {}),
    "sd1_ddim": (tiny_pipelines.sd1, {"scheduler": "ddim"}),
    "sd1_euler": (tiny_pipelines.sd1, {"scheduler": "euler"}),
    "sd2": (tiny_pipelines.sd1, {"scheduler": "v", **LINEAR}),
    "sd2_zero_snr": (tiny_pipelines.sd1, {"scheduler": "zero_snr", **LINEAR}),
    "sd1_linear": (tiny_pipelines.sd1, {"scheduler": "linear"}),
    "sd1_cosine": (tiny_pipelines.sd1, {"scheduler": "cosine"}),
    "inpainting": (tiny_pipelines.inpainting, {}),
    "editing": (tiny_pipelines.editing, {}),
    "sdxl": (tiny_pipelines.sdxl, {}),
    "refiner": (tiny_pipelines.refiner, {}),
    "sd3": (tiny_pipelines.sd3, {}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a kind of pipeline."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            build_one, options = KINDS[kind]
            folders[kind] = build_one(tmp_path_factory.mktemp(kind), **options)
        return folders[kind]

    return make


def theirs(folder: Path, kind: Any = diffusers.DiffusionPipeline) -> Any:
    pipeline = kind.from_pretrained(folder, **({"add_watermarker": False} if "XL" in kind.__name__ else {}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(loaded: Loaded) -> torch.Tensor:
    shape = loaded.networks["first_stage"].latent_shape(*loaded.size)  # type: ignore[operator]
    return SamplingDraws(range(len(CAPTIONS))).normal("sampling/start", shape)


def pictures(loaded: Loaded, **options: Any) -> list[Picture]:
    return [Picture(caption, seed, *loaded.size, **options) for seed, caption in enumerate(CAPTIONS)]


def assert_agree(ours: list[torch.Tensor], expected: torch.Tensor) -> None:
    """Mean absolute difference under 1/255, which rounding to 8 bits takes half of."""
    difference = (torch.stack(ours).float() / 255 - expected).abs()
    assert difference.mean() < 1 / 255 and difference.max() < 2 / 255
    assert expected.std() > 0.05, "a blank picture would agree with anything"


DRAWN = ["sd1", "sd1_ddim", "sd1_euler", "sd1_linear", "sd1_cosine", "sd2", "sd2_zero_snr", "sdxl", "sd3"]


@pytest.mark.parametrize("kind", DRAWN)
def test_pictures_are_those_of_diffusers_pipeline(kind, made):
    loaded = load_model(made(kind))
    expected = theirs(made(kind))(
        prompt=CAPTIONS,
        num_inference_steps=6,
        guidance_scale=3.0,
        latents=noise_of(loaded),
        height=loaded.size[0],
        width=loaded.size[1],
        output_type="pt",
        **({"max_sequence_length": 77} if kind == "sd3" else {}),
        **({"guidance_rescale": 0.7} if kind == "sd2_zero_snr" else {}),
    ).images
    sampler, guidance = sampler_of(OwnSampler(6), loaded), Guidance(3.0, rescale=0.7 * (kind == "sd2_zero_snr"))
    assert_agree(draw_pass(loaded.networks, loaded.process, sampler, guidance, pictures(loaded), CPU), expected)


def test_scales_are_those_that_diffusers_pipelines_draw_with(made):
    """The defaults of their calls, of every kind that has any; latent diffusion's are the paper's."""
    folder = PipelineFolder(made("sd1"))
    for kind in (kind for kind in _CONDITIONERS if not kind.startswith("LDM")):
        defaults = inspect.signature(getattr(diffusers, kind).__call__).parameters
        expected = {"scale": defaults["guidance_scale"].default}
        if "image_guidance_scale" in defaults:
            expected["picture_scale"] = defaults["image_guidance_scale"].default
        folder.kind = kind
        assert _guidance(folder) == expected, kind
    assert guidance_of(OwnGuidance(), load_model(made("sdxl"))).scale == 5.0
    editing = guidance_of(OwnGuidance(scale=2.0), load_model(made("editing")))
    assert (editing.scale, editing.picture_scale) == (2.0, 1.5)


@pytest.mark.parametrize("scale, picture_scale", [(3.0, 1.7), (3.0, 1.0)])
def test_an_edited_picture_is_that_of_instruct_pix2pix(scale, picture_scale, made, same_noise):
    loaded = load_model(made("editing"))
    same_noise(loaded)
    given = a_picture(loaded)
    expected = theirs(made("editing"))(
        prompt=CAPTIONS,
        image=as_theirs(given),
        num_inference_steps=6,
        guidance_scale=scale,
        image_guidance_scale=picture_scale,
        latents=noise_of(loaded),
        output_type="pt",
    ).images
    guidance, sampler = Guidance(scale, picture_scale), sampler_of(OwnSampler(6), loaded)
    asked = pictures(loaded, fields={"original": given})
    assert_agree(draw_pass(loaded.networks, loaded.process, sampler, guidance, asked, CPU), expected)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "refiner"])
@pytest.mark.parametrize("negative", [None, "a green triangle"])
@torch.no_grad()
def test_prompts_are_encoded_as_in_diffusers_pipeline(kind, negative, made):
    folder = made(kind)
    conditioner = build(config_of(PipelineFolder(folder))["conditioner"])
    pipeline = theirs(folder)
    given = Given(CAPTIONS, size=(16, 24))
    ours = conditioner(given)
    if negative is None:
        null = conditioner(given, conditioner.unconditional(2))
    else:
        null = conditioner(Given([negative] * 2, size=(16, 24)))
    negatives = [negative] * 2 if negative is not None else None
    options: dict[str, Any] = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    encoded = pipeline.encode_prompt(CAPTIONS, negative_prompt=negatives, **options)
    assert torch.equal(ours["context"], encoded[0]) and torch.equal(null["context"], encoded[1])
    if kind in ("sdxl", "refiner"):
        assert torch.equal(ours["pooled"], encoded[2]) and torch.equal(null["pooled"], encoded[3])
        last = [6.0] if kind == "refiner" else [16.0, 24.0]
        assert ours["size_ids"].tolist() == [[16.0, 24.0, 0.0, 0.0, *last]] * 2
    else:
        assert ours["pooled"].shape == (2, 0)


@pytest.fixture
def same_noise(monkeypatch):
    """diffusers draws our noise where it draws any; posteriors are taken at their mean."""

    def use(loaded: Loaded) -> None:
        def ours(shape: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return noise_of(loaded)[: shape[0]]

        for module in (
            "stable_diffusion.pipeline_stable_diffusion_img2img",
            "stable_diffusion.pipeline_stable_diffusion_inpaint",
            "stable_diffusion.pipeline_stable_diffusion_instruct_pix2pix",
            "stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img",
            "stable_diffusion_3.pipeline_stable_diffusion_3_img2img",
        ):
            monkeypatch.setattr(f"diffusers.pipelines.{module}.randn_tensor", ours)
        distribution = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
        monkeypatch.setattr(distribution, "sample", lambda self, generator=None: self.mean)

    return use


def a_picture(loaded: Loaded) -> torch.Tensor:
    height, width = loaded.size
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def as_theirs(picture: torch.Tensor) -> torch.Tensor:
    return (picture.float() / 255)[None].expand(len(CAPTIONS), -1, -1, -1)


@pytest.mark.parametrize(
    "kind, pipeline",
    [
        ("sd1_ddim", diffusers.StableDiffusionImg2ImgPipeline),
        ("sd1_euler", diffusers.StableDiffusionImg2ImgPipeline),
        ("sdxl", diffusers.StableDiffusionXLImg2ImgPipeline),
        ("refiner", diffusers.StableDiffusionXLImg2ImgPipeline),
        ("sd3", diffusers.StableDiffusion3Img2ImgPipeline),
    ],
)
def test_a_changed_picture_is_that_of_diffusers_image_to_image(kind, pipeline, made, same_noise):
    loaded = load_model(made(kind))
    same_noise(loaded)
    start = a_picture(loaded)
    expected = theirs(made(kind), pipeline)(
        prompt=CAPTIONS,
        image=as_theirs(start),
        strength=0.5,
        num_inference_steps=8,
        guidance_scale=3.0,
        output_type="pt",
        **({"max_sequence_length": 77} if kind == "sd3" else {}),
    ).images
    course = Course(strength=0.5)
    sampler = sampler_of(OwnSampler(8), loaded)
    latents = draw_latents(
        loaded.networks, loaded.process, sampler, Guidance(3.0), pictures(loaded, start=start), CPU, course
    )
    assert_agree(decode(loaded.networks, latents), expected)


@pytest.mark.parametrize(
    "kind, strength", [("sd1_ddim", 1.0), ("sd1_ddim", 0.6), ("inpainting", 1.0), ("inpainting", 0.6)]
)
def test_an_inpainted_picture_is_that_of_diffusers(kind, strength, made, same_noise):
    """By a network that is told the mask, and by one that is not."""
    loaded = load_model(made(kind))
    same_noise(loaded)
    start = a_picture(loaded)
    mask = torch.zeros(loaded.size, dtype=torch.bool)
    mask[4:12, 2:10] = True
    expected = theirs(made(kind), diffusers.StableDiffusionInpaintPipeline)(
        prompt=CAPTIONS,
        image=as_theirs(start),
        mask_image=mask[None, None].float().expand(2, -1, -1, -1),
        strength=strength,
        height=loaded.size[0],
        width=loaded.size[1],
        num_inference_steps=8,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    sampler = sampler_of(OwnSampler(8), loaded)
    asked = pictures(loaded, start=start, mask=mask)
    if kind == "inpainting":
        asked = pictures(loaded, image=start, fields={"mask": mask}, start=start if strength < 1 else None)
    course = Course(strength=strength if strength < 1 else None)
    latents = draw_latents(loaded.networks, loaded.process, sampler, Guidance(3.0), asked, CPU, course)
    assert_agree(decode(loaded.networks, latents), expected)


def test_base_and_refiner_share_a_course_as_in_diffusers(made):
    """As an ensemble of experts."""
    base, refiner = load_model(made("sdxl")), load_model(made("refiner"))
    options = {"num_inference_steps": 10, "guidance_scale": 3.0}
    latents = theirs(made("sdxl"))(
        prompt=CAPTIONS,
        latents=noise_of(base),
        height=base.size[0],
        width=base.size[1],
        denoising_end=0.8,
        output_type="latent",
        **options,
    ).images
    expected = theirs(made("refiner"), diffusers.StableDiffusionXLImg2ImgPipeline)(
        prompt=CAPTIONS, image=latents, denoising_start=0.8, output_type="pt", **options
    ).images
    sampler = sampler_of(OwnSampler(10), base)

    def run(loaded: Loaded, course: Course) -> torch.Tensor:
        return draw_latents(loaded.networks, loaded.process, sampler, Guidance(3.0), pictures(base), CPU, course)

    refined = run(refiner, Course(noisy=run(base, Course(stop=0.2)), start=0.2))
    assert_agree(decode(refiner.networks, refined), expected)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"beta_schedule": "exp"}, "beta_schedule"),
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"trained_betas": [0.1]}, "trained_betas"),
    ],
)
def test_schedules_that_are_not_implemented_are_named(changed, named):
    config = dict(tiny_pipelines.SCHEDULERS["ddim"]().config) | {"_class_name": "DDIMScheduler"}
    process_node(config)
    with pytest.raises(ValueError, match=named):
        process_node(config | changed)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler])
def test_steps_stand_where_diffusers_schedulers_take_them(spacing, scheduler):
    made = scheduler(beta_schedule="scaled_linear", timestep_spacing=spacing, steps_offset=1)
    made.set_timesteps(7)
    config = dict(made.config) | {"_class_name": scheduler.__name__}
    sampler = build(sampler_node(config, 7))
    times = sampler.grid.times(build(process_node(config)), 7)
    steps = times[:-1] * 1000 - 1
    if spacing == "linspace" and scheduler is diffusers.DDIMScheduler:
        steps = steps.round(decimals=6).round()  # DDIM takes whole steps only
    assert torch.allclose(steps, made.timesteps.double(), atol=1e-3)


def test_a_refiner_is_told_its_own_scores_and_guided_by_its_own_scale(made, tmp_path, capsys, monkeypatch):
    from PIL import Image

    told: list[tuple[float, tuple]] = []
    draw = sample.draw_latents

    def watched(networks: Any, process: Any, sampler: Any, guidance: Guidance, asked: list[Picture], *more: Any) -> Any:
        scores = tuple(float(picture.fields["aesthetic_score"]) for picture in asked if picture.fields)
        told.append((guidance.scale, scores))
        return draw(networks, process, sampler, guidance, asked, *more)

    monkeypatch.setattr(sample, "draw_latents", watched)
    base, refiner = load_model(made("sdxl")), load_model(made("refiner"))
    refiner.config["guidance"]["scale"] = 2.5
    monkeypatch.setattr(sample, "load_model", lambda path, *_: refiner if str(path) == str(made("refiner")) else base)
    job = [f"source={made('sdxl')}", f"refiner={made('refiner')}", "prompts=[a red circle]", "sampler.steps=5"]

    def run(*more: str) -> Any:
        told.clear()
        assert cli.execute(["sample", *job, f"out={tmp_path}", *more]) == 0, capsys.readouterr().err
        return Image.open(tmp_path / "00000.png")

    plain = run()
    assert told == [(5.0, ()), (2.5, ())]
    assert (float(plain.text["guidance"]), float(plain.text["refiner_guidance"])) == (5.0, 2.5)
    scored = run("fields.aesthetic_score=[1]", "guidance.scale=3")
    assert told == [(3.0, (1.0,)), (3.0, (1.0,))] and scored.text["aesthetic_score"] == "1"
    same = run("fields.aesthetic_score=[6]")  # which it is told by default
    assert same.tobytes() == plain.tobytes()
    assert run("fields.aesthetic_score=[1]").tobytes() != plain.tobytes()


@pytest.mark.parametrize(
    ("key", "value"), [("channels", 8), ("downsampling", 4), ("scaling_factor", 0.5), ("shift_factor", 0.1)]
)
def test_a_refiner_of_other_latents_is_refused(key, value, made, tmp_path, capsys, monkeypatch):
    base, refiner = load_model(made("sdxl")), load_model(made("refiner"))
    setattr(refiner.networks["first_stage"], key, value)
    monkeypatch.setattr(sample, "load_model", lambda path, *_: refiner if str(path) == str(made("refiner")) else base)
    job = [f"source={made('sdxl')}", f"refiner={made('refiner')}", "prompts=[a red circle]", "sampler.steps=2"]
    assert cli.execute(["sample", *job, f"out={tmp_path}"]) == 2
    assert f"refiner: {key} of its first stage is {value}, and " in capsys.readouterr().err


def test_the_job_changes_inpaints_edits_and_refines(made, tmp_path, capsys):
    from PIL import Image

    drawn = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    Image.fromarray(drawn.numpy()).save(tmp_path / "a.png")
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[:, 8:] = 255
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    job = [f"source={made('sdxl')}", "prompts=[a red circle]", "sampler.steps=5", "negative=a square"]

    def run(out: str, *more: str) -> torch.Tensor:
        assert cli.execute(["sample", *job, f"out={tmp_path}/{out}", *more]) == 0
        picture = Image.open(tmp_path / out / "00000.png")
        return torch.tensor(list(picture.getdata()), dtype=torch.float).view(16, 16, 3)

    plain = run("plain")
    weak, strong = (run(s, f"image={tmp_path}/a.png", f"strength={s}") for s in ("0.2", "1.0"))
    kept = run("mask", f"image={tmp_path}/a.png", f"mask={tmp_path}/mask.png")
    loaded = load_model(made("sdxl"))
    first_stage = loaded.networks["first_stage"]
    through = decode(loaded.networks, first_stage.encode(drawn.permute(2, 0, 1)[None].float() / 127.5 - 1))[0]  # type: ignore[operator]
    through = through.permute(1, 2, 0).float()
    assert (weak - through).abs().mean() < (strong - through).abs().mean()
    assert (kept - through)[:, :4].abs().mean() < (kept - through)[:, 8:].abs().mean()
    refined = run("refined", f"refiner={made('refiner')}")
    finished = run("finished", f"refiner={made('refiner')}", "refine_from=null", "refine_strength=0.4")
    assert (refined - plain).abs().mean() > 1 and (finished - plain).abs().mean() > 1
    assert cli.execute(["sample", *job, f"mask={tmp_path}/mask.png"]) == 2
    assert "no picture to change" in capsys.readouterr().err

    picture, hole = f"image={tmp_path}/a.png", f"mask={tmp_path}/mask.png"
    job[0] = f"source={made('editing')}"
    closer = "guidance.picture_scale=2.0"
    edited, again, close = run("e0", picture), run("e1", picture, "strength=0.3"), run("e2", picture, closer)
    assert (edited - again).abs().mean() > 1 and (edited - close).abs().mean() > 1
    assert cli.execute(["sample", *job]) == 2
    assert "the model reads a picture, 'original': give image=a.png" in capsys.readouterr().err
    job[0] = f"source={made('inpainting')}"
    assert (run("i0", picture, hole) - run("i1", picture, hole, "strength=0.3")).abs().mean() > 1
    assert cli.execute(["sample", *job, picture]) == 2
    assert "an inpainting model: give image=a.png mask=m.png" in capsys.readouterr().err
