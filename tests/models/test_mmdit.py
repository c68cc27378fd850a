"""MMDiT, against diffusers' class, published sizes and torch's FLOP counter."""

import random
from pathlib import Path

import diffusers
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.embeddings import sinusoid
from models.initialization import initialize
from models.mmdit import MMDiT

CONF = Path(__file__).parents[2] / "conf" / "model"


def random_config(seed: int) -> dict:
    """A small configuration with every option drawn."""
    draw = random.Random(seed)
    heads, channels, layers = draw.randint(1, 4), draw.choice([8, 16, 24]), draw.randint(1, 4)
    return {
        "sample_size": draw.choice([8, 16, 30]),
        "patch_size": draw.choice([1, 2, 4]),
        "in_channels": draw.randint(1, 5),
        "out_channels": draw.choice([3, 4, None]),
        "num_layers": layers,
        "attention_head_dim": channels,
        "num_attention_heads": heads,
        "joint_attention_dim": draw.choice([16, 40]),
        "caption_projection_dim": heads * channels,
        "pooled_projection_dim": draw.choice([8, 24]),
        "pos_embed_max_size": draw.choice([7, 12]),
        "dual_attention_layers": tuple(draw.sample(range(layers), draw.randint(0, layers))),
        "qk_norm": draw.choice([None, "rms_norm"]),
    }


def randomize(network: torch.nn.Module, seed: int) -> None:
    """Give every parameter values, so that nothing hides behind zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def as_diffusers(network: MMDiT) -> dict[str, Tensor]:
    return {k: v for name, t in network.state_dict().items() for k, v in network.to_diffusers(name, t).items()}


def inputs(config: dict, rows: int, columns: int, n: int = 2, length: int = 5) -> dict[str, Tensor]:
    p = config["patch_size"]
    return {
        "x": torch.randn(n, config["in_channels"], rows * p, columns * p),
        "timestep": torch.rand(n) * 1000,
        "context": torch.randn(n, length, config["joint_attention_dim"]),
        "pooled": torch.randn(n, config["pooled_projection_dim"]),
    }


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("seed", range(12))
def test_outputs_and_gradients_are_those_of_diffusers(seed):
    config = random_config(seed)
    torch.manual_seed(seed)
    theirs = diffusers.SD3Transformer2DModel(**config)
    randomize(theirs, seed)
    ours = MMDiT(**config)
    ours.load_state_dict(
        {name: ours.from_diffusers(name, theirs.state_dict().__getitem__) for name in ours.state_dict()}
    )

    most = config["pos_embed_max_size"]
    for rows, columns in [(most, most), (3, 6), (5, 2)]:
        batch = inputs(config, rows, columns)
        x = batch["x"].requires_grad_()
        prediction = ours(**batch)
        reference = theirs(
            x,
            encoder_hidden_states=batch["context"],
            pooled_projections=batch["pooled"],
            timestep=batch["timestep"],
        ).sample
        assert relative_error(prediction, reference) <= 1e-5
        direction = torch.randn_like(reference)
        of_x, of_qkv = torch.autograd.grad(prediction, [x, ours.blocks[0].image.attention.linear.weight], direction)
        their_qkv = [getattr(theirs.transformer_blocks[0].attn, f"to_{part}").weight for part in "qkv"]
        their_x, *their_qkv = torch.autograd.grad(reference, [x, *their_qkv], direction)
        assert relative_error(of_x, their_x) <= 1e-5
        assert relative_error(of_qkv, torch.cat(their_qkv)) <= 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_names_and_weights_map_to_diffusers_and_back(seed):
    config = random_config(seed)
    ours = initialize(MMDiT(**config), seed)
    theirs = diffusers.SD3Transformer2DModel(**config)
    named = as_diffusers(ours)
    assert {k: v.shape for k, v in named.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    # diffusers rounds the coordinates to float32 before it takes sines
    assert torch.allclose(named["pos_embed.pos_embed"], theirs.pos_embed.pos_embed, atol=1e-5)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(ours.from_diffusers(name, named.__getitem__), tensor), name


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("sd3_medium", 2_028_328_000, 683), ("sd35_medium", 2_243_171_520, 909), ("sd35_large", 8_056_627_520, 1_227)],
)
def test_published_sizes(name, parameters, tensors):
    with torch.device("meta"):
        network = MMDiT(**arguments(name))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(as_diffusers(network)) == tensors


def arguments(name: str) -> dict:
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=True)
    assert config.pop("_target_") == "models.mmdit.MMDiT"
    return config


def test_without_a_pooled_text_time_alone_modulates():
    """As in diffusers' network whose layers of the pooled text give zeros."""
    config = random_config(3) | {"pooled_projection_dim": 8}
    torch.manual_seed(3)
    theirs = diffusers.SD3Transformer2DModel(**config)
    randomize(theirs, 3)
    for parameter in theirs.time_text_embed.text_embedder.linear_2.parameters():
        torch.nn.init.zeros_(parameter)
    ours = MMDiT(**config | {"pooled_projection_dim": 0})
    read = theirs.state_dict().__getitem__
    ours.load_state_dict({name: ours.from_diffusers(name, read) for name in ours.state_dict()})
    batch = inputs(ours.config, 5, 6)
    pooled = torch.randn(2, 8)
    expected = theirs(
        batch["x"], timestep=batch["timestep"], encoder_hidden_states=batch["context"], pooled_projections=pooled
    ).sample
    assert batch["pooled"].shape == (2, 0) and relative_error(ours(**batch), expected) < 1e-5
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ours(**{name: value[:1] for name, value in batch.items()})
    assert ours.flops(*batch["x"].shape[-2:], 5) == counter.get_total_flops()


def test_one_dial_gives_the_papers_sizes():
    """A block of width w has 36 w^2 weights: 12 per stream in attention and MLP, 6 per stream in modulation."""
    for depth in (15, 18, 21, 30, 38):
        config = OmegaConf.load(CONF / "mmdit.yaml")
        config.num_layers = depth
        config = OmegaConf.to_container(config, resolve=True)
        del config["_target_"]
        with torch.device("meta"):
            network = MMDiT(**config)
        blocks = sum(p.numel() for p in network.blocks.parameters())
        assert blocks == pytest.approx(36 * (64 * depth) ** 2 * depth, rel=0.04)


@pytest.mark.parametrize("seed", range(6))
def test_flops_are_what_torch_counts(seed):
    config = random_config(seed)
    network = initialize(MMDiT(**config), seed)
    batch = inputs(config, 4, 7, n=3, length=9)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(**batch)
    p = config["patch_size"]
    assert 3 * network.flops(4 * p, 7 * p, 9) == counter.get_total_flops()


def test_first_values_are_adaln_zero():
    network = initialize(MMDiT(**random_config(2) | {"qk_norm": "rms_norm", "dual_attention_layers": [0]}), seed=1)
    for name, parameter in network.named_parameters():
        if "modulation" in name or name.startswith("final.") or name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std() > 0, name
    width = network.final.in_features
    bound = (6 / (2 * width)) ** 0.5  # Xavier, of a square matrix
    for part in network.blocks[0].image.attention.linear.weight.chunk(3):
        assert 0.9 * bound < part.abs().max() <= bound
    assert not network(**inputs(network.config, 4, 4)).any()


def test_a_network_filled_from_the_meta_device_is_the_same():
    config = random_config(5)
    with torch.device("meta"):
        empty = MMDiT(**config)
    filled = initialize(empty.to_empty(device="cpu"), seed=9)
    for (name, a), b in zip(
        filled.state_dict().items(), initialize(MMDiT(**config), seed=9).state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_time_is_embedded_in_float32_under_bfloat16_parameters():
    config = random_config(3)
    network = initialize(MMDiT(**config), seed=0)
    randomize(network, 0)
    exact = network.time_embedding.to(torch.bfloat16).float()(sinusoid(torch.tensor([999.0, 998.0])))
    network.to(torch.bfloat16)
    seen = network.time_embedding(sinusoid(torch.tensor([999.0, 998.0])))
    assert seen.dtype == torch.float32
    assert torch.equal(seen, exact)

    batch = inputs(config, 4, 4)
    assert network(**batch).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="keep them in float32"):
        network(**batch | {"timestep": batch["timestep"].bfloat16()})


def test_sizes_that_do_not_fit_are_named():
    config = random_config(0) | {"patch_size": 2, "pos_embed_max_size": 7}
    network = initialize(MMDiT(**config), seed=0)
    with pytest.raises(ValueError, match="multiples of 2 and at most 14"):
        network(**inputs(config, 8, 2))
    with pytest.raises(ValueError, match="multiples of 2 and at most 14"):
        network.flops(7, 4, 1)
    with pytest.raises(ValueError, match="names block 9, but there are"):
        MMDiT(**config | {"dual_attention_layers": [9]})
    with pytest.raises(ValueError, match="caption_projection_dim is 5"):
        MMDiT(**config | {"caption_projection_dim": 5})


def test_learned_positions_are_trained_and_cropped_from_the_centre():
    config = random_config(1) | {"patch_size": 1, "pos_embed_max_size": 7, "learned_positions": True}
    network = initialize(MMDiT(**config), seed=0)
    randomize(network, 0)
    network(**inputs(config, 3, 5)).sum().backward()
    touched = network.positions.table.grad.abs().sum(-1).view(7, 7) > 0
    assert touched[2:5, 1:6].all()
    assert touched.sum() == 15

    theirs = diffusers.SD3Transformer2DModel(**{k: v for k, v in config.items() if k != "learned_positions"})
    theirs.load_state_dict(as_diffusers(network))
    batch = inputs(config, 3, 5)
    reference = theirs(
        batch["x"],
        encoder_hidden_states=batch["context"],
        pooled_projections=batch["pooled"],
        timestep=batch["timestep"],
    ).sample
    assert relative_error(network(**batch), reference) <= 1e-5


def test_positions_follow_the_papers_formula():
    """Section 5.3.2: from 256 px to S px, patch p sits at (p - (max - s) / 2) 256 / S with s = S / 16."""
    side, pixels = 192, 1024
    s = pixels // 16
    paper = MMDiT(
        **random_config(0)
        | {"pos_embed_max_size": side, "position_offset": (side - s) / 2, "position_scale": 256 / pixels}
    )
    coordinates = torch.atan2(*paper.positions.axis.chunk(2, dim=1))  # modulo 2 pi, at the highest frequency
    centre = coordinates[(side - s) // 2 : (side + s) // 2, 0]
    assert torch.allclose(centre[:12], torch.arange(12) * 0.25, atol=1e-6)
