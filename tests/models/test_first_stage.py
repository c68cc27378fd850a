"""First stages, against what diffusers' pipelines do around an autoencoder."""

import json

import diffusers
import pytest
import torch

from conf.compose import compose
from conf.schema import build
from models.autoencoder import AutoencoderKL
from models.first_stage import CodesFirstStage, Identity, KLFirstStage, VQFirstStage
from models.initialization import initialize
from models.pretrained import save
from models.vq import VQModel

SMALL = {
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "latent_channels": 3,
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
}


@pytest.fixture
def folder(tmp_path):
    save(initialize(AutoencoderKL(**SMALL), seed=4), tmp_path)
    return tmp_path


def filled_from(folder, **changes) -> KLFirstStage:
    """As an engine does it: built on the meta device, then filled parameter by parameter."""
    with torch.device("meta"):
        stage = KLFirstStage(AutoencoderKL(**SMALL | changes), str(folder))
    return initialize(stage.to_empty(device="cpu"), seed=0)


def test_latents_are_those_of_diffusers(folder):
    stage, theirs = filled_from(folder), diffusers.AutoencoderKL.from_pretrained(folder)
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    assert stage.latent_shape(8, 12) == (3, 4, 6)
    noise = torch.randn(2, *stage.latent_shape(8, 12))
    posterior = theirs.encode(images).latent_dist
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor
    assert torch.allclose(stage.encode(images), (posterior.mean - shift) * scale, atol=1e-6)
    latents = stage.encode(images, noise)
    assert torch.allclose(latents, (posterior.mean + posterior.std * noise - shift) * scale, atol=1e-5)
    assert torch.allclose(stage.decode(latents), theirs.decode(latents / scale + shift).sample, atol=1e-5)


def test_it_stays_frozen_and_lets_gradients_through(folder):
    stage = filled_from(folder).train()
    assert not any(module.training for module in stage.modules())
    assert not any(parameter.requires_grad for parameter in stage.parameters())
    latents = torch.randn(1, 3, 4, 4, requires_grad=True)
    stage.decode(latents).sum().backward()
    assert latents.grad.any()


def test_latents_are_float32_under_bfloat16_parameters(folder):
    exact, coarse = filled_from(folder), filled_from(folder).to(torch.bfloat16)
    images, noise = torch.rand(1, 3, 8, 8) * 2 - 1, torch.randn(1, 3, 4, 4)
    latents = coarse.encode(images, noise)
    assert latents.dtype == coarse.decode(latents).dtype == torch.float32
    assert torch.allclose(latents, exact.encode(images, noise), atol=0.05)


def test_another_autoencoders_folder_is_refused(folder):
    with pytest.raises(ValueError, match=r"scaling_factor is 2\.5, but .* 1\.5"):
        filled_from(folder, scaling_factor=2.5)
    with pytest.raises(ValueError, match=r"does not fit AutoencoderKL: .*quant_conv\.weight"):
        filled_from(folder, use_quant_conv=False)


def test_identity_is_the_pixels():
    stage = initialize(Identity(), seed=0)
    images = torch.rand(2, 3, 6, 5)
    assert stage.latent_shape(6, 5) == (3, 6, 5)
    assert torch.equal(stage.decode(stage.encode(images, torch.randn_like(images))), images)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *[("identity", (3, 64, 96)), ("kl_sd3", (16, 8, 12)), ("kl_sdxl", (4, 8, 12)), ("kl_tiny", (4, 16, 24))],
        *[("kl_f4", (3, 16, 24)), ("kl_f8", (4, 8, 12)), ("kl_f16", (16, 4, 6)), ("kl_f32", (64, 2, 3))],
        *[("vq_f4", (3, 16, 24)), ("vq_f4_noattn", (3, 16, 24)), ("vq_f8", (4, 8, 12)), ("vq_f8_n256", (4, 8, 12))],
        *[("vq_f16", (8, 4, 6)), ("vq_f16_codes", (8, 4, 6))],
    ],
)
def test_shipped_configurations(name, shape):
    config = compose("train", [f"first_stage={name}", *([] if name == "identity" else ["first_stage.folder=null"])])
    with torch.device("meta"):
        stage = build(config.first_stage)
    assert stage.latent_shape(64, 96) == shape
    kinds = {"identity": Identity, "vq_f16_codes": CodesFirstStage}
    assert type(stage) is kinds.get(name, VQFirstStage if name.startswith("vq") else KLFirstStage)


def test_a_run_that_has_not_ended_is_told(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"is a run that has not ended.* holds vae/"):
        filled_from(tmp_path)


def test_the_scaling_of_a_folder_is_taken_where_none_is_given(tmp_path):
    # As a pipeline has it, or a run: the component in a folder of its own.
    save(initialize(AutoencoderKL(**SMALL), seed=4), tmp_path / "vae")
    stage = filled_from(tmp_path, scaling_factor=None, shift_factor=None)
    assert (stage.scaling_factor, stage.shift_factor) == (1.5, 0.06)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.equal(stage.encode(images), filled_from(tmp_path).encode(images))
    # It goes out with the weights, as all that the folder says of them.
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"force_upcast": False, "a_key_of_next_year": 1}))
    save(filled_from(tmp_path, scaling_factor=None, shift_factor=None).autoencoder, tmp_path / "again")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "again").config
    assert (again.scaling_factor, again.shift_factor, again.force_upcast) == (1.5, 0.06, False)
    assert json.loads((tmp_path / "again/config.json").read_text())["a_key_of_next_year"] == 1
    # Folders of 2022 have no scaling factor: diffusers takes its class's default.
    config = json.loads((tmp_path / "vae/config.json").read_text())
    del config["scaling_factor"], config["shift_factor"]
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    assert filled_from(tmp_path, scaling_factor=None, shift_factor=None).scaling_factor == 0.18215


def test_vq_latents_are_not_quantised_before_they_are_decoded(tmp_path):
    small = {"block_out_channels": [8, 8], "norm_num_groups": 4, "num_vq_embeddings": 9, "scaling_factor": 2.0}
    save(initialize(VQModel(**small), seed=4), tmp_path / "vqvae")
    with torch.device("meta"):
        stage = VQFirstStage(VQModel(**small), str(tmp_path))
    stage = initialize(stage.to_empty(device="cpu"), seed=0)
    theirs = diffusers.VQModel.from_pretrained(tmp_path / "vqvae")
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    latents = stage.encode(images, torch.randn(2, 3, 4, 6))
    assert torch.allclose(latents, theirs.encode(images).latents * 2, atol=1e-6)
    assert torch.equal(latents, stage.sample(stage.moments(images)))
    assert torch.allclose(stage.decode(latents), theirs.decode(latents / 2).sample, atol=1e-5)
    kept = stage.fingerprint(0, torch.device("cpu"))
    with torch.no_grad():
        theirs.quantize.embedding.weight.add_(1)
        theirs.save_pretrained(tmp_path / "vqvae")
    del stage._weights
    assert stage.fingerprint(0, torch.device("cpu")) == kept  # codes change nothing of what is kept


def test_codes_are_those_that_latents_are_quantised_to(tmp_path):
    small = {"block_out_channels": [8, 8], "norm_num_groups": 4, "num_vq_embeddings": 9, "scaling_factor": 1.0}
    autoencoder = initialize(VQModel(**small), seed=4)
    with torch.no_grad():
        autoencoder.quantize.embedding.weight.mul_(9)  # codes as far from each other as latents are
    save(autoencoder, tmp_path / "vqvae")
    with torch.device("meta"):
        stages = [kind(VQModel(**small), str(tmp_path)) for kind in (CodesFirstStage, VQFirstStage)]
    coded, plain = (initialize(stage.to_empty(device="cpu"), seed=0) for stage in stages)
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    codes = coded.encode(images, torch.randn(2, 3, 4, 6))
    assert coded.codes == 9 and codes.dtype == torch.int64 and codes.shape == (2, 4, 6) and len(codes.unique()) >= 3
    assert torch.equal(codes, autoencoder(images).codes) and torch.equal(codes, coded.sample(coded.moments(images)))
    assert torch.allclose(coded.decode(codes), plain.decode(plain.encode(images)), atol=1e-6)
    theirs = diffusers.VQModel.from_pretrained(tmp_path / "vqvae")
    quantized, _, (_, _, theirs_codes) = theirs.quantize(theirs.encode(images).latents)
    assert torch.equal(codes.flatten(), theirs_codes.flatten())
    assert torch.allclose(coded.decode(codes), theirs.decode(quantized, force_not_quantize=True).sample, atol=1e-5)
