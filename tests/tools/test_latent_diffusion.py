"""Latent diffusion's own checkpoints: what is imported gives what the authors' networks give, and diffusers' pipelines
of it draw what we draw.

The networks are the authors' own, as `stable-diffusion-sdkit` packages them (UNet, encoder and decoder) and as they
took them from `x-transformers`; only what puts them together is told here.
"""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer

from conf.compose import compose
from conf.schema import build
from models.given import Given
from models.guidance import Guidance
from models.original import configs, names
from models.original.checkpoint import OriginalCheckpoint
from models.pipeline_folder import PipelineFolder, is_network
from models.tensor_files import open_file
from tests import foreign
from tests.trainer.jobs import QUICK, train_on
from tests.trainer.task_tars import write_task_tars
from tools import cli, importing
from trainer.engines.networks import prepare_frozen
from trainer.loading import load_model
from trainer.sample import sampler_of
from trainer.sampling import OwnSampler, Picture, SamplingDraws, draw_pass

PACKAGES = ("stable-diffusion-sdkit==2.1.5", "x-transformers==0.8.1", "einops==0.8.1", "entmax==1.3")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "##s", "of"]
CAPTIONS = ["a red circle", "blue circles of a red circle"]

# The authors' settings in small, and what is told to `import` of what weights do not tell.
PLAIN = {"in_channels": 3, "channel_mult": [1, 2], "attention_resolutions": [2], "num_head_channels": 32}
KINDS = {
    "ldm": (PLAIN, [], "LDMPipeline"),
    "churches": (
        {
            **{"in_channels": 3, "channel_mult": [1, 1, 2], "attention_resolutions": [1, 2], "num_heads": 4},
            **{"resblock_updown": True, "use_scale_shift_norm": True},
        },
        ["heads=4"],
        "LDMPipeline",
    ),
    "super_resolution": (PLAIN | {"in_channels": 6}, ["head_channels=32"], "LDMSuperResolutionPipeline"),
    "inpainting": (
        {
            **{"in_channels": 7, "channel_mult": [1, 2, 2], "attention_resolutions": [2, 4], "num_heads": 4},
            "resblock_updown": True,
        },
        ["heads=4"],
        "LDMInpaintPipeline",
    ),
    "class": (
        PLAIN | {"num_head_channels": -1, "num_heads": 1, "use_spatial_transformer": True, "context_dim": 24},
        ["heads=1", "classes=5"],
        "LDMClassPipeline",
    ),
    "text": (PLAIN | {"use_spatial_transformer": True, "context_dim": 40}, [], "LDMTextToImagePipeline"),
    "semantic": (
        PLAIN | {"in_channels": 6, "num_head_channels": -1, "num_heads": 2, "attention_resolutions": []},
        ["heads=2"],
        "LDMSemanticPipeline",
    ),
    "layout": (PLAIN | {"use_spatial_transformer": True, "context_dim": 16}, [], "LDMLayoutPipeline"),
}
kinds = pytest.mark.parametrize("kind", KINDS)

# Writes <kind>.ckpt, a checkpoint as the authors' trainer saves it, and <kind>.pt, inputs and outputs.
SCRIPT = """
import json, sys
import torch
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from x_transformers import Encoder as Layers, TransformerWrapper

out, kinds, tokens = sys.argv[1], json.loads(sys.argv[2]), torch.tensor(json.loads(sys.argv[3]))
torch.manual_seed(0)

def random(module):
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.ndim < 2 else 1.5 / parameter[0].numel() ** 0.5)
    return module.eval()

class Rows(torch.nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.embedding = torch.nn.Embedding(rows, width)

class FirstStage(torch.nn.Module):
    def __init__(self, quantized):
        super().__init__()
        told = dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[], in_channels=3, resolution=16)
        told |= dict(z_channels=3, out_ch=3, double_z=not quantized)
        self.encoder, self.decoder = Encoder(**told), Decoder(**told)
        moments = 3 if quantized else 6
        self.quant_conv, self.post_quant_conv = torch.nn.Conv2d(moments, moments, 1), torch.nn.Conv2d(3, 3, 1)
        if quantized:
            self.quantize = Rows(7, 3)

    def encode(self, images):
        return self.quant_conv(self.encoder(images))[:, :3]  # latents, or their means

    def decode(self, latents):
        if hasattr(self, "quantize"):
            codes = self.quantize.embedding.weight
            nearest = (latents[:, None] - codes[None, :, :, None, None]).square().sum(2).argmin(1)
            latents = codes[nearest].permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(latents))

class System(torch.nn.Module):
    def __init__(self, kind, settings):
        super().__init__()
        self.model = torch.nn.Module()
        defaults = dict(image_size=8, model_channels=32, out_channels=3, num_res_blocks=1, use_checkpoint=False)
        self.model.diffusion_model = UNetModel(**defaults | settings)
        self.first_stage_model = FirstStage(kind not in ("churches", "text"))
        self.cond_stage_model = torch.nn.Module()
        if kind == "class":
            self.cond_stage_model = Rows(6, 24)
        if kind in ("text", "layout"):
            size = dict(num_tokens=11, max_seq_len=10) if kind == "text" else dict(num_tokens=8192, max_seq_len=92)
            layers = Layers(dim=settings["context_dim"], depth=2 if kind == "text" else 1)
            self.cond_stage_model.transformer = TransformerWrapper(attn_layers=layers, **size)
        if kind == "semantic":
            self.cond_stage_model.channel_mapper = torch.nn.Conv2d(5, 3, 1, bias=False)
        if kind == "inpainting":
            self.cond_stage_model = self.first_stage_model

with torch.no_grad():
    for kind, settings in kinds.items():
        system = random(System(kind, settings))
        state = dict(system.state_dict())
        start, end = (0.0015, 0.0155) if kind == "churches" else (0.00085, 0.012)
        state["betas"] = (torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2).float()
        state["alphas_cumprod"] = (1 - state["betas"]).cumprod(0)
        if kind == "churches":
            state["scale_factor"] = torch.tensor(0.75)
        torch.save({"state_dict": state, "global_step": 3}, f"{out}/{kind}.ckpt")
        images, x = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, settings["in_channels"], 8, 8)
        times, context = torch.tensor([3, 700]), None
        if kind == "class":
            context = system.cond_stage_model.embedding(torch.tensor([[2], [5]]))
        if kind == "text":
            context = system.cond_stage_model.transformer(tokens, return_embeddings=True)
        if kind == "layout":
            boxes = torch.randint(8192, (2, 92))
            context = system.cond_stage_model.transformer(boxes, return_embeddings=True)
        if kind == "semantic":
            labels = torch.randint(5, (2, 16, 16))
            halved = torch.nn.functional.one_hot(labels, 5).movedim(-1, 1).float()
            halved = torch.nn.functional.interpolate(halved, scale_factor=0.5, mode="bilinear")
            x[:, 3:] = system.cond_stage_model.channel_mapper(halved)
        predicted = system.model.diffusion_model(x, times, context=context)
        latents = system.first_stage_model.encode(images)
        given = dict(images=images, x=x, times=times, predicted=predicted, latents=latents)
        given |= dict(decoded=system.first_stage_model.decode(latents))
        given |= {} if context is None else dict(context=context)
        given |= dict(boxes=boxes) if kind == "layout" else dict(labels=labels) if kind == "semantic" else {}
        torch.save(given, f"{out}/{kind}.pt")
print(json.dumps(len(kinds)))
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=10).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory, tokenizer) -> Path:
    """A folder with the authors' checkpoints and outputs of each kind."""
    packages = foreign.install(tmp_path_factory.mktemp("packages"), *PACKAGES)
    out = tmp_path_factory.mktemp("originals")
    told = {"padding": "max_length", "max_length": 10, "truncation": True}
    tokens = BertTokenizer.from_pretrained(tokenizer)(CAPTIONS, **told).input_ids
    settings = {kind: of for kind, (of, _, _) in KINDS.items()}
    assert foreign.ask(packages, SCRIPT, str(out), json.dumps(settings), json.dumps(tokens)) == len(KINDS)
    return out


@pytest.fixture(scope="module")
def imported(originals, tokenizer, tmp_path_factory):
    """A folder of each kind."""
    runs = tmp_path_factory.mktemp("runs")

    def run(kind: str) -> Path:
        if not (runs / kind).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(importing._TOKENIZERS, "bert", importing._Published(str(tokenizer), "BertTokenizer"))
                command = ["import", f"source={originals}/{kind}.ckpt", f"name={kind}", f"runs={runs}"]
                assert cli.execute([*command, *KINDS[kind][1]]) == 0
        return runs / kind

    return run


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@kinds
@torch.no_grad()
def test_imported_networks_give_what_the_authors_do(kind, originals, imported):
    told = torch.load(originals / f"{kind}.pt")
    folder, loaded = PipelineFolder(imported(kind)), load_model(imported(kind))
    assert folder.kind == KINDS[kind][2]
    assert loaded.config["guidance"]["scale"] == (1.5 if kind in ("class", "text") else 1.0)
    denoiser, conditioner, first_stage = (loaded.networks[name] for name in ("denoiser", "conditioner", "first_stage"))
    context = None
    if kind == "class":
        given = Given(["", ""], fields={"class": torch.tensor([2, 5])})
        context = conditioner(given)["context"]
        # The last is none.
        assert torch.equal(conditioner(given, conditioner.unconditional(2))["context"][0], context[1])
    if kind == "text":
        context = conditioner(Given(CAPTIONS))["context"]
    if kind == "layout":
        context = conditioner.numbered()[0].encode(told["boxes"])[0]
    if context is not None:
        close(context, told["context"])
    x, beside = told["x"][:, :3], told["x"][:, 3:]
    if kind == "semantic":
        given = Given(["", ""], (16, 16), fields={"map": told["labels"]}, first_stage=first_stage)
        close(conditioner(given)["concat"], beside)
    predicted = denoiser(x, told["times"], context=context, concat=beside if beside.numel() else None)
    assert told["predicted"].std() > 0.1
    close(predicted, told["predicted"])
    scale = {"churches": 0.75, "text": 0.18215}.get(kind, 1.0)
    close(first_stage.encode(told["images"]), told["latents"] * scale)
    close(first_stage.decode(told["latents"] * scale), told["decoded"])
    betas = open_file(originals / f"{kind}.ckpt").read("betas")
    alpha = loaded.process.alpha_sigma(torch.arange(1, 1001, dtype=torch.float64) / 1000)[0]
    torch.testing.assert_close(alpha**2, (1 - betas.double()).cumprod(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["ldm", "super_resolution", "text"])
def test_diffusers_draws_the_same_pictures(kind, imported, monkeypatch, tmp_path):
    folder = shutil.copytree(imported(kind), tmp_path / kind)
    if kind == "super_resolution":  # whose pipeline scales no latents, whatever is told
        told = json.loads((folder / "vqvae/config.json").read_text())
        assert told.pop("scaling_factor") == 1.0
        (folder / "vqvae/config.json").write_text(json.dumps(told))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = SamplingDraws([0]).normal("sampling/start", (3, 8, 8))
    module = __import__(type(pipeline).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    small = (torch.rand(3, 8, 8) * 255).byte()
    if kind == "ldm":
        theirs = torch.from_numpy(pipeline(num_inference_steps=4, output_type="np").images).movedim(-1, 1)
    elif kind == "super_resolution":
        # Which takes pixels at the latents' size.
        theirs = pipeline(small[None] / 127.5 - 1, num_inference_steps=4, output_type="pt").images
    else:
        # It divides the sides by 8, whatever its first stage does, and cuts captions at 77 tokens.
        told = {"guidance_scale": 3.0, "height": 64, "width": 64}
        with monkeypatch.context() as patch:
            cut = {"padding": "max_length", "max_length": 10, "truncation": True, "return_tensors": "pt"}
            own = pipeline.tokenizer
            patch.setattr(pipeline, "tokenizer", lambda texts, **_: own(texts, **cut), raising=False)
            theirs = pipeline(CAPTIONS[:1], num_inference_steps=4, output_type="pt", **told).images
    loaded = load_model(folder)
    assert loaded.size == (256, 256)
    for name, network in loaded.networks.items():
        prepare_frozen(name, network, False, "fp32", 0, torch.device("cpu"))
    fields = {"low_resolution": small} if kind == "super_resolution" else {}
    picture = Picture(CAPTIONS[0] if kind == "text" else "", 0, 16, 16, fields=fields)
    sampler, guidance = sampler_of(OwnSampler(4), loaded), Guidance(3.0 if kind == "text" else 1.0)
    ours = draw_pass(loaded.networks, loaded.process, sampler, guidance, [picture], torch.device("cpu"))
    assert theirs.std() > 0.05
    assert (torch.stack(ours).float() / 255 - torch.as_tensor(theirs)).abs().mean() < 1 / 255


@kinds
def test_the_authors_file_comes_back(kind, originals, imported, tmp_path):
    """With every tensor that counts, and what it tells of schedule and scale; and is the folder again beside one like
    it, which tells what weights do not."""
    assert cli.execute(["export", f"source={imported(kind)}", f"out={tmp_path}/back.safetensors"]) == 0
    theirs, back = open_file(originals / f"{kind}.ckpt"), open_file(tmp_path / "back.safetensors")
    seconds = ("alphas_cumprod", *(["cond_stage_model."] if kind == "inpainting" else []))
    assert set(back.names()) == {n for n in theirs.names() if not n.startswith(seconds)} | {"scale_factor"}
    for name in set(back.names()) & set(theirs.names()):
        torch.testing.assert_close(back.read(name), theirs.read(name), rtol=1e-6 if name == "betas" else 0, atol=0)
    command = ["import", f"source={tmp_path}/back.safetensors", "name=again", f"runs={tmp_path}/runs"]
    assert cli.execute([*command, f"like={imported(kind)}"]) == 0
    before, again = PipelineFolder(imported(kind)), PipelineFolder(tmp_path / "runs/again")
    assert again.index == before.index
    assert cli.execute(["import", f"source={again.path}", "name=folder", f"runs={tmp_path}/runs"]) == 0
    for name in before.components:
        assert again.config(name) == before.config(name) == PipelineFolder(tmp_path / "runs/folder").config(name), name


@pytest.mark.parametrize(
    "kind, told, trained",
    [
        ("churches", [], {"unet"}),
        ("class", ["fields.class=[1,3]"], {"unet", "class_embedder"}),
        ("text", ["prompts=[a red circle]"], {"unet", "bert"}),
        ("semantic", ["fields.map=[{map}]"], {"unet", "map_embedder"}),
        ("layout", ["fields.boxes=['[[4,4,8,8,1]]']"], {"unet", "bert"}),
        ("super_resolution", ["fields.low_resolution=[{low}]"], {"unet"}),
    ],
)
def test_it_is_trained_on_sampled_and_exported(kind, told, trained, imported, tmp_path):
    write_task_tars(tmp_path / "tars", 20)
    data = [f"data.sources.drawn.shards={tmp_path}/tars", "buckets=square", "buckets.size=16", "schedule.lr=0.001"]
    options = [f"experiment={imported(kind)}/experiment.yaml", "name=on", "steps=2", "batch=4", "lanes=2", "ema=none"]
    assert cli.execute(["plan", *options, *data, "cluster.processes=2"]) == 0  # which reads no weights
    assert len(train_on(1, tmp_path, *options, *data, small=QUICK)) == 2
    run, out = tmp_path / "runs/on", tmp_path / "out"
    assert cli.execute(["export", f"source={run}", f"out={out}"]) == 0
    before, after = PipelineFolder(imported(kind)), PipelineFolder(out)
    assert after.kind == before.kind and after.components == before.components
    assert after.config("scheduler") == before.config("scheduler")
    changed = set()
    for name in (name for name in before.components if is_network(name)):
        ours, theirs = before.tensors(name), after.tensors(name)
        assert set(theirs.names()) == {one for one in ours.names() if not one.startswith("to_logits.")}
        changed |= {name for one in theirs.names() if not torch.equal(ours.read(one), theirs.read(one))}
        assert before.config(name).items() >= after.config(name).items() or name in ("unet", "vqvae")
    assert changed == trained
    # Both are sampled from, and draw the same.
    Image.new("RGB", (8, 8), "red").save(tmp_path / "low.png")
    Image.new("L", (16, 16), 2).save(tmp_path / "map.png")
    told = [one.format(low=tmp_path / "low.png", map=tmp_path / "map.png") for one in told]
    told += ["sampler.steps=2", "height=16", "width=16", "seed=3"]
    pictures = []
    for source in (run, out):
        assert cli.execute(["sample", f"source={source}", f"out={tmp_path}/{source.name}_drawn", *told]) == 0
        pictures.append(Image.open(tmp_path / f"{source.name}_drawn" / "00000.png").tobytes())
    assert pictures[0] == pictures[1] and len(set(pictures[0])) > 20


def test_a_file_has_no_place_for_another_schedule(imported, tmp_path, capsys):
    folder = shutil.copytree(imported("ldm"), tmp_path / "linear")
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"beta_schedule": "linear"}))
    assert cli.execute(["export", f"source={folder}", f"out={tmp_path}/file.safetensors"]) == 2
    assert "out: a single file tells latent diffusion's own noise schedule alone" in capsys.readouterr().err


def test_classes_without_a_vector_for_none_are_told_of(originals, tmp_path, capsys):
    """As those of the first ImageNet model, LDM-8."""
    command = ["import", f"source={originals}/class.ckpt", "name=it", f"runs={tmp_path}", "heads=1", "classes=6"]
    assert cli.execute(command) == 0
    assert "without guidance" in capsys.readouterr().out
    sample = ["sample", f"source={tmp_path}/it", f"out={tmp_path}/out", "fields.class=[6]"]
    assert cli.execute(sample) == 2
    assert "fields.class: 6" in capsys.readouterr().err
    loaded = load_model(tmp_path / "it")
    assert loaded.config["guidance"]["scale"] == 1.0
    conditioner = loaded.networks["conditioner"]
    given = Given(["", ""], fields={"class": torch.tensor([5, 2])})
    context = conditioner(given)["context"]
    close(context[0], torch.load(originals / "class.pt")["context"][1])
    assert torch.equal(conditioner(given, conditioner.unconditional(2))["context"], torch.zeros_like(context))


def test_nothing_of_a_file_is_left_over(originals):
    """The inpainting model's encoder of the masked picture is its first stage, which stands in the file twice."""
    for kind in KINDS:
        assert OriginalCheckpoint(open_file(originals / f"{kind}.ckpt")).unused() == []


def test_an_average_beside_the_weights_is_told_of(originals, tmp_path, capsys):
    state = torch.load(originals / "ldm.ckpt")["state_dict"]
    stem = "model.diffusion_model."
    averages = {f"model_ema.{n.removeprefix('model.').replace('.', '')}": state[n] + 1 for n in state if stem in n}
    torch.save({"state_dict": state | averages}, tmp_path / "both.ckpt")
    command = ["import", f"source={tmp_path}/both.ckpt", f"runs={tmp_path}/runs"]
    assert cli.execute([*command, "name=weights"]) == 0
    assert "average=ema" in capsys.readouterr().out
    assert cli.execute([*command, "name=average", "average=ema"]) == 0
    assert "average=ema" not in capsys.readouterr().out
    sources = [PipelineFolder(tmp_path / "runs" / name).tensors("unet") for name in ("weights", "average")]
    for name in sources[0].names():
        torch.testing.assert_close(sources[1].read(name), sources[0].read(name) + 1)


@pytest.mark.parametrize(
    "kind, lost, added, more, named",
    [
        ("ldm", "betas", {}, [], "betas"),
        ("ldm", "model.diffusion_model.out.2.weight", {}, [], "model.diffusion_model.out.2.weight"),
        ("ldm", "first_stage_model.decoder.conv_in.bias", {}, [], "decoder.conv_in.bias"),
        ("ldm", None, {"cond_stage_model.proj.weight": (3, 182)}, [], "cond_stage_model.proj.weight"),
        ("ldm", None, {"model.diffusion_model.input_blocks.0.0.weight": (32, 5, 3, 3)}, [], "input_blocks.0.0.weight"),
        ("ldm", None, {"betas": (1000,)}, [], "betas"),
        ("ldm", None, {}, ["heads=5"], "heads=5"),
        ("ldm", None, {}, ["heads=2", "head_channels=32"], "head_channels: "),
        ("churches", "scale_factor", {}, [], "scaling_factor: "),
        ("class", None, {}, [], "classes: "),
        ("class", "cond_stage_model.embedding.weight", {}, [], "attn2.to_k.weight"),
        ("class", None, {}, ["classes=9"], "embedding.weight is (6, 24)"),
        ("semantic", None, {"cond_stage_model.channel_mapper.weight": (2, 5, 1, 1)}, [], "concat_channels=3"),
        ("class", None, {"cond_stage_model.embedding.weight": (6, 8)}, ["classes=5"], "cross_attention_dim=24"),
        ("layout", "cond_stage_model.transformer.norm.bias", {}, [], "model.layer_norm.bias"),
        ("text", "cond_stage_model.transformer.pos_emb.emb.weight", {}, [], "transformer.pos_emb.emb.weight"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(kind, lost, added, more, named, originals, tmp_path, capsys):
    state = torch.load(originals / f"{kind}.ckpt")["state_dict"]
    state.pop(lost, None)
    state |= {name: torch.zeros(shape) for name, shape in added.items()}
    torch.save({"state_dict": state}, tmp_path / "it.ckpt")
    assert cli.execute(["import", f"source={tmp_path}/it.ckpt", "name=it", f"runs={tmp_path}/runs", *more]) in (1, 2)
    told = capsys.readouterr().err
    assert named in told and "Traceback" not in told
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    "name",
    ["celebahq", "churches", "imagenet", "inpainting", "layout", "semantic", "super_resolution", "text2img"],
)
def test_published_sizes_are_recognised(name):
    """From shapes alone, with the heads that these models have: as conf/model describes them."""
    with torch.device("meta"):
        network = build(compose("train", [f"model=ldm_{name}"]).model)
    ours = network.diffusers_config() | network.config | {"in_channels": network.diffusers_config()["in_channels"]}
    if name == "imagenet":
        ours["attention_head_dim"] = 1  # cin256-v2
    state = {
        theirs: value
        for key, tensor in network.state_dict().items()
        for theirs, value in network.to_diffusers(key, tensor).items()
    }
    table = names.Names(names.unet(ours))
    originals, rest = table.originals(state)
    assert not rest
    shapes = {one: tuple(table.to_original(one, [state[p] for p in parts]).shape) for one, parts in originals.items()}
    told = configs.unet_of_ldm(shapes)
    assert told["_class_name"] == network.diffusers_class
    attends = ["Attn" in kind for kind in told["down_block_types"]]
    for key in told.keys() - {"_class_name", "sample_size"}:
        theirs, value = ours[key], told[key]
        if isinstance(value, list) and not isinstance(theirs, list):
            theirs = [theirs if yes else 1 for yes in attends]  # of levels that attend
        assert value == theirs, key
