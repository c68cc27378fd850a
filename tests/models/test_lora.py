"""LoRA: an adapted network against the merged one, and against diffusers and peft reading what we wrote."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.given import Given
from models.initialization import initialize
from models.lora import CONFIG_FILE, DENOISER, DIFFUSERS_FILE, PEFT_FILE, Adapter, LoRA, save_adapters
from models.pipeline_folder import PipelineFolder
from models.pretrained import load
from tests.foreign import ask, install
from tests.models import tiny_pipelines
from trainer.loading import load_model, merge_adapters

KINDS = {"sd1": tiny_pipelines.sd1, "sdxl": tiny_pipelines.sdxl, "sd3": tiny_pipelines.sd3}
ALL = ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "add_k_proj", "proj_in"]
ALL += ["conv_in", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_pipelines.made_once(KINDS, tmp_path_factory)


def inputs(network: torch.nn.Module, kind: str) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    config = network.config
    width = config["joint_attention_dim" if kind == "sd3" else "cross_attention_dim"]
    given = {
        "x": torch.randn(2, 4, 8, 8, generator=drawn),
        "timestep": torch.tensor([100.0, 700.0]),
        "context": torch.randn(2, 5, width, generator=drawn),
    }
    if kind != "sd1":
        given["pooled"] = torch.randn(2, 18 if kind == "sd3" else 10, generator=drawn)
    if kind == "sdxl":
        given["size_ids"] = torch.randint(0, 64, (2, 6), generator=drawn).float()
    return given


def adapted(folder: Path, **options) -> torch.nn.Module:
    """The denoiser with adapters that change it."""
    pipeline = PipelineFolder(folder)
    base = folder / pipeline.denoiser
    network = initialize(LoRA(rank=3, alpha=6.0, **options).adapt(load(base), str(base)), seed=0)
    drawn = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        assert name.endswith(("lora_down", "lora_up"))
        if name.endswith("lora_up"):
            parameter.data.normal_(std=0.3, generator=drawn)
    return network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [None, ALL])
@torch.no_grad()
def test_adapters_beside_the_weights_are_adapters_in_them(kind, targets, made):
    folder = made(kind)
    plain = load(folder / PipelineFolder(folder).denoiser)
    given = inputs(plain, kind)
    network = adapted(folder, **({"targets": targets} if targets else {}))
    before, beside = plain(**given), network(**given)
    Adapter.of(network, dict(network.named_parameters())).merge_into(plain)
    torch.testing.assert_close(beside, plain(**given), rtol=1e-4, atol=1e-5)
    assert (beside - before).abs().mean() > 0.01 * before.abs().mean()
    for name, parameter in network.named_parameters():
        if name.endswith("lora_up"):
            parameter.zero_()
    torch.testing.assert_close(network(**given), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_files_come_back(kind, made, tmp_path):
    network = adapted(made(kind), targets=ALL)
    adapter = Adapter.of(network, dict(network.named_parameters()))
    save_adapters({DENOISER: adapter}, tmp_path, PipelineFolder(made(kind)).denoiser, "base")
    for file in (tmp_path, tmp_path / DIFFUSERS_FILE, tmp_path / PEFT_FILE):
        again = Adapter.load(file)
        assert again.down.keys() == adapter.down.keys() == again.up.keys()
        for module in adapter.down:
            assert torch.equal(again.down[module], adapter.down[module])
            assert torch.equal(again.up[module], adapter.up[module])
        assert again.alphas == adapter.alphas == dict.fromkeys(adapter.down, 6.0)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 6.0 and config["peft_type"] == "LORA"


def test_alphas_of_files_count(made, tmp_path):
    network = adapted(made("sd1"))
    adapter = Adapter.of(network, dict(network.named_parameters()))
    save_adapters({DENOISER: adapter}, tmp_path, "unet", "base")
    # Patterns among the settings, of ends of modules' names.
    settings = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"alpha_pattern": {"attn1.to_q": 1.5}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings))
    own = Adapter.load(tmp_path / PEFT_FILE).alphas
    assert own == {module: 1.5 if module.endswith("attn1.to_q") else 6.0 for module in adapter.down}
    assert set(own.values()) == {1.5, 6.0}
    # Numbers of their own beside the matrices.
    tensors = load_file(tmp_path / DIFFUSERS_FILE) | {f"unet.{m}.alpha": torch.tensor(2.0) for m in adapter.down}
    save_file(tensors, tmp_path / "with.safetensors")
    assert set(Adapter.load(tmp_path / "with.safetensors").alphas.values()) == {2.0}


def test_a_scale_multiplies_what_is_merged(made):
    network = adapted(made("sd1"))
    adapter = Adapter.of(network, dict(network.named_parameters()))
    plain, whole, half = (load(made("sd1") / "unet") for _ in range(3))
    adapter.merge_into(whole)
    adapter.merge_into(half, scale=0.5)
    moved = 0.0
    for a, b, c in zip(plain.parameters(), whole.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(c - a, (b - a) / 2, rtol=1e-3, atol=1e-5)
        moved += (b - a).abs().sum().item()
    assert moved > 1


_ASK = """
import json, sys, torch, diffusers
from peft import PeftModel
from safetensors.torch import load_file, save_file
base, adapters, given, out = sys.argv[1:]
given = load_file(given)
def run(network):
    options = {"timestep": given["timestep"], "encoder_hidden_states": given["context"]}
    if "Transformer" in type(network).__name__:
        options |= {"hidden_states": given["x"], "pooled_projections": given["pooled"]}
    else:
        options["sample"] = given["x"]
    if "size_ids" in given:
        options["added_cond_kwargs"] = {"text_embeds": given["pooled"], "time_ids": given["size_ids"]}
    with torch.no_grad():
        return network(**options).sample
def denoiser(pipeline):
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
before = run(denoiser(pipeline))
pipeline.load_lora_weights(adapters)
by_diffusers = run(denoiser(pipeline))
pipeline.unload_lora_weights()
wrapped = PeftModel.from_pretrained(denoiser(diffusers.DiffusionPipeline.from_pretrained(base)), adapters)
by_peft = run(wrapped.base_model.model)
denoiser(pipeline).load_lora_adapter(adapters, weight_name="pytorch_lora_weights.safetensors", adapter_name="ours",
    prefix="transformer" if hasattr(pipeline, "transformer") else "unet")
denoiser(pipeline).save_lora_adapter(out + "/again", adapter_name="ours")
save_file({"before": before, "diffusers": by_diffusers, "peft": by_peft}, out + "/outputs.safetensors")
print(json.dumps(True))
"""


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_diffusers_and_peft_read_our_adapters_and_we_read_theirs(kind, made, tmp_path, tmp_path_factory):
    libraries = install(tmp_path_factory.getbasetemp() / "peft", "peft")
    network = adapted(made(kind), targets=ALL[:4] if kind == "sd3" else ALL)
    adapter = Adapter.of(network, dict(network.named_parameters()))
    save_adapters({DENOISER: adapter}, tmp_path / "adapters", PipelineFolder(made(kind)).denoiser, "base")
    given = inputs(network, kind)
    save_file(given, tmp_path / "given.safetensors")
    ask(
        libraries, _ASK, str(made(kind)), str(tmp_path / "adapters"), str(tmp_path / "given.safetensors"), str(tmp_path)
    )
    outputs = load_file(tmp_path / "outputs.safetensors")
    ours = network(**given)
    assert (ours - outputs["before"]).abs().mean() > 0.01 * ours.abs().mean()
    for reader in ("diffusers", "peft"):
        torch.testing.assert_close(outputs[reader], ours, rtol=1e-4, atol=1e-4)
    theirs = Adapter.load(next((tmp_path / "again").glob("*.safetensors")))
    assert theirs.down.keys() == adapter.down.keys()


_TRAINED = """
import json, sys, torch, diffusers
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
base, out = sys.argv[1:]
kind = diffusers.StableDiffusionXLPipeline
pipeline = kind.from_pretrained(base, add_watermarker=False)
torch.manual_seed(0)
parts = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
for name, part in parts.items():
    targets = ["to_q", "conv1"] if name == "unet" else ["q_proj", "out_proj"]
    part.add_adapter(LoraConfig(r=2, lora_alpha=5 if name == "unet" else 3, target_modules=targets))
    for key, parameter in part.named_parameters():
        if "lora" in key:
            torch.nn.init.normal_(parameter, std=0.2)
layers = {("unet" if k == "unet" else k) + "_lora_layers": get_peft_model_state_dict(v) for k, v in parts.items()}
kind.save_lora_weights(out + "/lora", **layers, **_collate_lora_metadata(parts))
fresh = kind.from_pretrained(base, add_watermarker=False)
fresh.load_lora_weights(out + "/lora")
encoded = fresh.encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=False)
x, t = torch.ones(1, 4, 8, 8), torch.tensor([300.0])
added = {"text_embeds": encoded[2], "time_ids": torch.ones(1, 6)}
with torch.no_grad():
    prediction = fresh.unet(x, t, encoded[0], added_cond_kwargs=added).sample
outputs = {"context": encoded[0].contiguous(), "pooled": encoded[2].contiguous(), "prediction": prediction}
save_file(outputs, out + "/outputs.safetensors")
print(json.dumps(True))
"""


_OF_PEFT = """
import json, sys, torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
base, out, settings = sys.argv[1:]
unet = UNet2DConditionModel.from_pretrained(base)
torch.manual_seed(0)
config = LoraConfig(**json.loads(settings))
wrapped = get_peft_model(unet, config)
for key, parameter in wrapped.named_parameters():
    if "lora_" in key:
        torch.nn.init.normal_(parameter, std=0.2)
wrapped.save_pretrained(out + "/peft")
fresh = UNet2DConditionModel.from_pretrained(base)
fresh.add_adapter(config)
named = {k.replace(".default", ""): v for k, v in wrapped.named_parameters() if "lora_" in k}
own = dict(fresh.named_parameters())
for key, value in named.items():
    own["".join(key.removeprefix("base_model.model.").rsplit(".weight", 1)) + ".default.weight"].data.copy_(value)
fresh.save_lora_adapter(out + "/diffusers")
before = {name: value.clone() for name, value in UNet2DConditionModel.from_pretrained(base).state_dict().items()}
merged = wrapped.merge_and_unload().state_dict()
save_file({name: merged[name] - before[name] for name in before}, out + "/changes.safetensors")
print(json.dumps(True))
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"attn1.to_q": 1, r".*\.\d+\.attn2\.to_[qv]": 0, "to_q": 9, "q": 30}},
        {"use_rslora": True, "rank_pattern": {"attn2.to_(q|v)": 2}, "alpha_pattern": {"attn1.to_v|conv1": 5}},
    ],
    ids=["rslora", "patterns", "both"],
)
@torch.no_grad()
def test_factors_are_those_that_peft_merges_by(settings, made, tmp_path, tmp_path_factory):
    """Rank-stabilized ones, and those of single modules, in peft's files and in the header of diffusers'."""
    libraries, unet = install(tmp_path_factory.getbasetemp() / "peft", "peft"), made("sd1") / "unet"
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_v", "conv1"], **settings}
    ask(libraries, _OF_PEFT, str(unet), str(tmp_path), json.dumps(settings))
    expected = load_file(tmp_path / "changes.safetensors")
    for folder in ("peft", "diffusers"):
        network, before = load(unet), load(unet)
        Adapter.load(tmp_path / folder).merge_into(network)
        changes = {name: tensor - before.state_dict()[name] for name, tensor in network.state_dict().items()}
        theirs = {k: v for name, change in changes.items() for k, v in network.to_diffusers(name, change).items()}
        assert theirs.keys() == expected.keys()
        for name, change in expected.items():
            torch.testing.assert_close(theirs[name], change, rtol=1e-3, atol=1e-5, msg=f"{folder}: {name}")
    assert sum(bool(change.any()) for change in expected.values()) > 4


def test_a_pattern_that_is_none_is_named_with_its_file(made, tmp_path):
    network = adapted(made("sd1"))
    save_adapters({DENOISER: Adapter.of(network, dict(network.named_parameters()))}, tmp_path, "unet", "base")
    settings = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"alpha_pattern": {"(to_q": 1.5}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"{PEFT_FILE}: alpha_pattern '\(to_q' is no regular expression"):
        Adapter.load(tmp_path / PEFT_FILE)
    (tmp_path / CONFIG_FILE).write_text(
        json.dumps(settings | {"alpha_pattern": {}, "init_lora_weights": "pissa_niter_4"})
    )
    with pytest.raises(ValueError, match=rf"{PEFT_FILE}: init_lora_weights is 'pissa_niter_4', which changes"):
        Adapter.load(tmp_path / PEFT_FILE)


@torch.no_grad()
def test_adapters_of_text_encoders_too_that_diffusers_has_written(made, tmp_path, tmp_path_factory):
    ask(install(tmp_path_factory.getbasetemp() / "peft", "peft"), _TRAINED, str(made("sdxl")), str(tmp_path))
    outputs = load_file(tmp_path / "outputs.safetensors")
    loaded = load_model(made("sdxl"))
    merge_adapters(tmp_path / "lora", loaded)
    told = loaded.networks["conditioner"](Given(["a red circle"], size=(16, 16)))
    torch.testing.assert_close(told["context"], outputs["context"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(told["pooled"], outputs["pooled"], rtol=1e-4, atol=1e-4)
    given = {"x": torch.ones(1, 4, 8, 8), "timestep": torch.tensor([300.0]), "size_ids": torch.ones(1, 6)}
    prediction = loaded.networks["denoiser"](**given, context=told["context"], pooled=told["pooled"])
    torch.testing.assert_close(prediction, outputs["prediction"], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="adapts text_encoder, which"):
        merge_adapters(tmp_path / "lora", load_model(tiny_pipelines.refiner(tmp_path)))
    with pytest.raises(ValueError, match="and not of a denoiser alone"):
        Adapter.load(tmp_path / "lora")


def test_mistakes_are_named(made, tmp_path):
    plain = load(made("sd1") / "unet")
    with pytest.raises(ValueError, match=r"adapter\.targets=\['nothing'\]: UNet has no such modules"):
        LoRA(targets=["nothing"]).adapt(plain, "x")
    with pytest.raises(ValueError, match="rank=0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="holds no adapters"):
        Adapter.load(tmp_path)
    network = adapted(made("sd3"))
    adapter = Adapter.of(network, dict(network.named_parameters()))
    with pytest.raises(ValueError, match=r"modules that UNet lacks: transformer_blocks\.0"):
        adapter.merge_into(plain)
    network.base = str(made("sd1") / "unet")
    with pytest.raises(ValueError, match="lacks"):
        network.init_buffers()
    assert (tmp_path / PEFT_FILE).exists() is False
