"""Adapters of text encoders: beside the weights against in them, and read by diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.given import Given
from models.lora import DENOISER, Adapter, LoRA, load_adapters, save_adapters
from models.text_lora import adapt_text, text_adapters
from tests.foreign import ask, install
from tests.models import tiny_pipelines
from trainer.loading import load_model, merge_adapters

TARGETS = ["q_proj", "out_proj", "fc1"]
GIVEN = Given(["a red circle", "a blue square left of a red circle"], size=(16, 16))
KINDS = {"sdxl": tiny_pipelines.sdxl, "sd3": tiny_pipelines.sd3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_pipelines.made_once(KINDS, tmp_path_factory)


def adapted(folder: Path) -> Any:
    """A conditioner with adapters that change it."""
    conditioner: Any = load_model(folder).networks["conditioner"]
    adapt_text(conditioner, LoRA(rank=3, alpha=6.0, text_targets=TARGETS), seed=0)
    drawn = torch.Generator().manual_seed(2)
    for name, parameter in conditioner.named_parameters():
        if name.endswith("lora_up"):
            parameter.data.normal_(std=0.3, generator=drawn)
    return conditioner


def adapters_of(conditioner: Any) -> dict[str, Adapter]:
    numbered = text_adapters(dict(conditioner.named_parameters()), 6.0)
    return {f"text_encoder{f'_{number + 1}' if number else ''}": adapter for number, adapter in numbered.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_beside_the_weights_are_adapters_in_them(kind, made, tmp_path):
    conditioner = adapted(made(kind))
    assert {name.rpartition(".")[2] for name, _ in conditioner.named_parameters()} == {"lora_down", "lora_up"}
    assert conditioner.learned and not any(encoder.training for encoder in conditioner.train().numbered())
    beside = conditioner(GIVEN)
    assert beside["context"].requires_grad

    plain = load_model(made(kind))
    before = plain.networks["conditioner"](GIVEN)
    found = adapters_of(conditioner)
    assert found.keys() == {"text_encoder", "text_encoder_2"}
    some = {DENOISER: Adapter({"to_q": torch.zeros(1, 2)}, {"to_q": torch.zeros(2, 1)}, {"to_q": 1.0})}
    save_adapters(some | found, tmp_path, "unet", "base")
    for component, adapter in load_adapters(tmp_path).items():
        if component != DENOISER:
            number = list(found).index(component)
            adapter.merge_into_text(plain.networks["conditioner"].numbered()[number].model)
    merged = plain.networks["conditioner"](GIVEN)
    for name in ("context", "pooled"):
        torch.testing.assert_close(beside[name], merged[name], rtol=1e-4, atol=1e-5)
        assert (beside[name] - before[name]).abs().mean() > 0.01 * before[name].abs().mean()
    # They begin as nothing, the same on every rank.
    fresh = [load_model(made(kind)).networks["conditioner"] for _ in range(2)]
    for one in fresh:
        adapt_text(one, LoRA(rank=3, text_targets=TARGETS), seed=5)
        torch.testing.assert_close(one(GIVEN)["context"], before["context"])
    for (name, a), b in zip(fresh[0].named_parameters(), fresh[1].parameters(), strict=True):
        assert torch.equal(a, b) and a.any() == name.endswith("lora_down")


_ASK = """
import json, sys, torch, diffusers
from safetensors.torch import save_file
base, adapters, out = sys.argv[1:]
pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)
pipeline.load_lora_weights(adapters)
with torch.no_grad():
    encoded = pipeline.encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=False)
save_file({"context": encoded[0].contiguous(), "pooled": encoded[2].contiguous()}, out)
print(json.dumps(True))
"""


def test_diffusers_reads_our_adapters(made, tmp_path, tmp_path_factory):
    libraries = install(tmp_path_factory.getbasetemp() / "peft", "peft")
    conditioner = adapted(made("sdxl"))
    loaded = load_model(made("sdxl"))
    network = LoRA(rank=3, alpha=6.0).adapt(loaded.networks["denoiser"], str(made("sdxl") / "unet"))
    unet = Adapter.of(network, {name: torch.zeros_like(p) for name, p in network.named_parameters()})
    save_adapters({DENOISER: unet} | adapters_of(conditioner), tmp_path / "adapters", "unet", "base")
    ask(libraries, _ASK, str(made("sdxl")), str(tmp_path / "adapters"), str(tmp_path / "told.safetensors"))
    theirs = load_file(tmp_path / "told.safetensors")
    ours = conditioner(GIVEN)
    for name in ("context", "pooled"):
        torch.testing.assert_close(theirs[name], ours[name][:1], rtol=1e-4, atol=1e-4)
    again = load_model(made("sdxl"))
    merge_adapters(tmp_path / "adapters", again)
    merged = again.networks["conditioner"](GIVEN)
    torch.testing.assert_close(merged["context"], ours["context"], rtol=1e-4, atol=1e-5)


def test_what_is_not_there_is_named(made):
    with pytest.raises(ValueError, match=r"adapter\.text_targets=\['nothing'\]: no CLIP text encoder"):
        adapt_text(load_model(made("sdxl")).networks["conditioner"], LoRA(text_targets=["nothing"]), 0)
