"""The UNet, against diffusers' classes, published sizes and torch's FLOP counter."""

import random
from pathlib import Path

import diffusers
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.initialization import initialize
from models.unet import UNet
from models.unet_blocks import Conv

CONF = Path(__file__).parents[2] / "conf" / "model"
MODELS = sorted(path.stem for path in CONF.glob("*.yaml") if "models.unet.UNet" in path.read_text())
# diffusers has no way to give every level so many heads.
WITHOUT_COUNTERPART = ("ldm_churches", "ldm_inpainting")


def random_config(seed: int) -> dict:
    """A small configuration with every option drawn: of UNet2DConditionModel for even seeds, else of UNet2DModel."""
    draw = random.Random(seed)
    levels, text = draw.randint(1, 4), seed % 2 == 0
    kinds = [draw.choice(["", "CrossAttn"] if text else ["", "Attn", "Resnet"]) for _ in range(levels)]
    common = {
        "block_out_channels": [16 * draw.randint(1, 3) for _ in range(levels)],
        "down_block_types": ["ResnetDownsampleBlock2D" if k == "Resnet" else f"{k}DownBlock2D" for k in kinds],
        "up_block_types": ["ResnetUpsampleBlock2D" if k == "Resnet" else f"{k}UpBlock2D" for k in reversed(kinds)],
        "in_channels": draw.randint(1, 5),
        "out_channels": draw.randint(1, 5),
        "layers_per_block": draw.randint(1, 3),
        "norm_num_groups": draw.choice([4, 8]),
        "norm_eps": draw.choice([1e-5, 1e-3]),
        "resnet_time_scale_shift": draw.choice(["default", "scale_shift"]),
    }
    if not text:
        return common | {
            "attention_head_dim": draw.choice([4, 8, 16]),
            "downsample_type": draw.choice(["conv", "resnet"]),
            "upsample_type": draw.choice(["conv", "resnet"]),
            "attn_norm_num_groups": draw.choice([2, 4]),
        }
    sizes = draw.choice([None, 5, 6])
    sized = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 10 + 8 * (sizes or 0)}
    return common | {
        "cross_attention_dim": draw.choice([12, 40]),
        "transformer_layers_per_block": draw.choice([1, 2, [draw.randint(1, 3) for _ in range(levels)]]),
        "attention_head_dim": draw.choice([2, [draw.choice([1, 2, 4]) for _ in range(levels)]]),
        "use_linear_projection": draw.choice([True, False]),
        **(sized | {"addition_embed_type": "text_time"} if sizes else {}),
    }


def counterpart(config: dict) -> torch.nn.Module:
    return (diffusers.UNet2DConditionModel if "cross_attention_dim" in config else diffusers.UNet2DModel)(**config)


def randomize(network: torch.nn.Module, seed: int) -> None:
    """Give every parameter values, so that nothing hides behind zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def as_diffusers(network: UNet) -> dict[str, Tensor]:
    return {k: v for name, t in network.state_dict().items() for k, v in network.to_diffusers(name, t).items()}


def with_weights_of(theirs: torch.nn.Module, **config) -> UNet:
    network = UNet(**config)
    state = theirs.state_dict()
    network.load_state_dict({name: network.from_diffusers(name, state.__getitem__) for name in network.state_dict()})
    return network


def inputs(network: UNet, rows: int, columns: int, n: int = 2, length: int = 5) -> dict[str, Tensor]:
    """A batch of so many pixels of the coarsest level, with all that the network reads."""
    config, f = network.config, network.downsampling
    given = {"x": torch.randn(n, network.in_channels, f * rows, f * columns), "timestep": torch.rand(n) * 1000}
    if config["concat_channels"]:
        given["concat"] = torch.randn(n, config["concat_channels"], f * rows, f * columns)
    if "cross_attention_dim" in config:
        given["context"] = torch.randn(n, length, config["cross_attention_dim"])
    if config.get("addition_embed_type"):
        channels, dim = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
        sizes = min(6, (channels - 1) // dim)
        given["pooled"] = torch.randn(n, channels - sizes * dim)
        given["size_ids"] = torch.randint(0, 1024, (n, sizes))
    return given


def call_diffusers(theirs: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x = torch.cat([batch["x"], batch["concat"]], dim=1) if "concat" in batch else batch["x"]
    if "context" not in batch:
        return theirs(x, batch["timestep"]).sample
    added = {"text_embeds": batch["pooled"], "time_ids": batch["size_ids"]} if "pooled" in batch else None
    return theirs(x, batch["timestep"], batch["context"], added_cond_kwargs=added).sample


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("seed", range(16))
def test_outputs_and_gradients_are_those_of_diffusers(seed):
    config = random_config(seed)
    torch.manual_seed(seed)
    theirs = counterpart(config)
    randomize(theirs, seed)
    ours = with_weights_of(theirs, **config)
    for rows, columns in [(4, 4), (1, 3)]:
        batch = inputs(ours, rows, columns)
        x = batch["x"].requires_grad_()
        prediction, reference = ours(**batch), call_diffusers(theirs, batch)
        assert relative_error(prediction, reference) <= 1e-5
        direction = torch.randn_like(reference)
        mine = torch.autograd.grad(prediction, [x, ours.conv_in.weight, ours.time_embedding.up.bias], direction)
        their_weights = [theirs.conv_in.weight, theirs.time_embedding.linear_1.bias]
        of_x, of_weight, of_bias = torch.autograd.grad(reference, [x, *their_weights], direction)
        for a, b in zip(mine, (of_x, of_weight.permute(0, 2, 3, 1), of_bias), strict=True):
            assert relative_error(a, b) <= 3e-5


@pytest.mark.parametrize("seed", range(8))
def test_names_and_weights_map_to_diffusers_and_back(seed):
    config = random_config(seed)
    ours = initialize(UNet(**config), seed)
    named = as_diffusers(ours)
    assert {k: v.shape for k, v in named.items()} == {k: v.shape for k, v in counterpart(config).state_dict().items()}
    for name, tensor in ours.state_dict().items():
        assert torch.equal(ours.from_diffusers(name, named.__getitem__), tensor), name


def arguments(name: str) -> dict:
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=True)
    assert config.pop("_target_") == "models.unet.UNet"
    return config


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("sd15", 859_520_964, 686), ("sdxl_base", 2_567_463_684, 1_680)],
)
def test_published_sizes(name, parameters, tensors):
    with torch.device("meta"):
        network = UNet(**arguments(name))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(as_diffusers(network)) == tensors


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        *(("ldm_celebahq", 274), ("ldm_churches", 295), ("ldm_imagenet", 401), ("ldm_imagenet_f8", 395)),
        *(("ldm_inpainting", 387), ("ldm_semantic", 215), ("ldm_super_resolution", 114)),
    ],
)
def test_sizes_are_those_that_ldm_rounds_to(name, millions):
    """The paper gives 274, 294 (of 294.97), about 400, 391 to 396, 387 and 215; the last is of a published
    configuration."""
    with torch.device("meta"):
        network = UNet(**arguments(name))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITHOUT_COUNTERPART])
def test_real_topologies_are_those_of_diffusers(name):
    """On the meta device at full size, and in numbers with the same levels, depths and heads at a 32nd of the width."""
    config = arguments(name)
    with torch.device("meta"):
        network = UNet(**config)
        kind = getattr(diffusers, network.diffusers_class)
        written = {k: v for k, v in network.diffusers_config().items() if k not in UNet.own_config}
        theirs = kind(**written)
    shapes = {k: tuple(v.shape) for k, v in as_diffusers(network).items()}
    assert shapes == {k: tuple(v.shape) for k, v in theirs.state_dict().items()}

    narrow = 64 if "cross_attention_dim" in network.config and config["cross_attention_dim"] else 28
    small = {
        "block_out_channels": [width // narrow * 4 for width in config["block_out_channels"]],
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "addition_time_embed_dim": 8,
        "pooled_dim": 12,
        "attention_head_dim": 4 if network.diffusers_class == "UNet2DModel" else None,
    }
    config |= {k: v for k, v in small.items() if v and (k not in config or config[k] is not None)}
    if network.diffusers_class == "UNet2DConditionModel":
        heads = config["attention_head_dim"]
        heads = [heads] * len(config["block_out_channels"]) if isinstance(heads, int) else heads
        config["block_out_channels"] = [4 * h for h in heads]
    ours = UNet(**config)
    theirs = kind(**{k: v for k, v in ours.diffusers_config().items() if k not in UNet.own_config})
    torch.manual_seed(0)
    randomize(theirs, 1)
    ours = with_weights_of(theirs, **config)
    batch = inputs(ours, 2, 3)
    with torch.no_grad():
        assert relative_error(ours(**batch), call_diffusers(theirs, batch)) <= 1e-5


def test_heads_of_every_level():
    """LDM's churches and inpainting: so many heads at every level, where diffusers counts channels of a head."""
    config = random_config(1) | {
        "block_out_channels": [16, 32],
        "down_block_types": ["AttnDownBlock2D"] * 2,
        "up_block_types": ["AttnUpBlock2D"] * 2,
        "attention_head_dim": 16,
        "norm_num_groups": 4,
    }
    network = initialize(UNet(**config | {"attention_heads": 2}), seed=0)
    levels = (*network.down_blocks, network.mid_block, *network.up_blocks)
    assert {attention.heads for level in levels for attention in level.attentions} == {2}


@pytest.mark.parametrize("seed", range(8))
def test_flops_are_what_torch_counts(seed):
    network = initialize(UNet(**random_config(seed)), seed)
    batch = inputs(network, 2, 3, n=3, length=9)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(**batch)
    assert 3 * network.flops(*batch["x"].shape[-2:], 9) == counter.get_total_flops()


@pytest.mark.parametrize("seed", [2, 3])
def test_first_values_are_adms(seed):
    config = random_config(seed) | {"resnet_time_scale_shift": "default"}
    network = initialize(UNet(**config), seed=1)
    for name, parameter in network.named_parameters():
        path = name.split(".")
        last = path[-2] in ("conv2", "proj_out", "conv_out") or (path[-2] == "to_out" and "attn1" not in name)
        last = last and "attn2" not in name
        if name.endswith("bias") or last:
            assert not parameter.any(), name
        elif "norm" in path[-2]:
            assert (parameter == 1).all(), name
        else:
            bound = (1 / parameter[0].numel()) ** 0.5  # torch's own, of the fan-in
            assert 0.5 * bound < parameter.abs().max() <= bound, name
    batch = inputs(network, 2, 2)
    assert not network(**batch).any()


def test_a_network_filled_from_the_meta_device_is_the_same():
    config = random_config(4)
    with torch.device("meta"):
        empty = UNet(**config)
    filled = initialize(empty.to_empty(device="cpu"), seed=9)
    for (name, a), b in zip(
        filled.state_dict().items(), initialize(UNet(**config), seed=9).state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_maps_keep_their_channels_innermost():
    """What every convolution gets and gives, so that none copies its input or its weight."""
    network = initialize(UNet(**random_config(0)), seed=0)
    seen = []
    for module in network.modules():
        if isinstance(module, Conv):
            module.register_forward_hook(lambda m, args, out: seen.append((args[0].stride(1), out.stride(1))))
    network(**inputs(network, 4, 4))
    assert set(seen) == {(1, 1)}


def test_time_and_sizes_are_embedded_in_float32_under_bfloat16_parameters():
    config = random_config(0) | {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    network = initialize(UNet(**config, pooled_dim=10, size_ids=6), seed=0)
    randomize(network, 0)
    batch = inputs(network, 2, 2)
    seen: list[Tensor] = []
    network.add_embedding.register_forward_hook(lambda m, args, out: seen.append(out))
    network.to(torch.bfloat16)
    assert network(**batch).dtype == torch.bfloat16
    network(**batch | {"size_ids": batch["size_ids"] + 1})
    assert seen[0].dtype == torch.float32 and not torch.equal(*seen)
    for name in ("timestep", "size_ids"):
        with pytest.raises(ValueError, match="keep them in float32"):
            network(**batch | {name: batch[name].bfloat16()})


def test_conditions_are_read_where_there_is_a_place_for_them():
    plain = initialize(UNet(**random_config(1)), seed=0)
    randomize(plain, 0)
    batch = inputs(plain, 2, 2)
    extra = {"context": torch.randn(2, 3, 7), "pooled": torch.randn(2, 4), "size_ids": torch.zeros(2, 6)}
    assert torch.equal(plain(**batch), plain(**batch, **extra))
    with pytest.raises(ValueError, match="concat: 3 channels where the network reads 0"):
        plain(**batch, concat=torch.randn(2, 3, *batch["x"].shape[2:]))

    config = random_config(0) | {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    network = initialize(UNet(**config, pooled_dim=10, size_ids=6, concat_channels=2), seed=0)
    randomize(network, 0)
    batch = inputs(network, 2, 2)
    for name in ("context", "pooled", "size_ids", "concat"):
        with pytest.raises(ValueError, match=name):
            network(**{k: v for k, v in batch.items() if k != name})
        changed = {name: batch[name] + 1}
        assert not torch.equal(network(**batch), network(**batch | changed)), name
        short = {name: batch[name].narrow(-1 if name == "context" else 1, 0, 1)}
        with pytest.raises(ValueError, match=name):
            network(**batch | short)


def test_what_does_not_fit_is_named():
    config = random_config(2) | {"block_out_channels": [16, 32, 32]}
    config |= {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3, "norm_num_groups": 4}
    config |= {"attention_head_dim": 2, "transformer_layers_per_block": 1}
    network = initialize(UNet(**config), seed=0)
    with pytest.raises(ValueError, match="multiples of 4"):
        network.flops(8, 6, 1)
    with pytest.raises(ValueError, match="multiples of 4"):
        network(**inputs(network, 2, 2) | {"x": torch.zeros(2, network.in_channels, 8, 6)})
    for wrong, told in [
        ({"down_block_types": ["DownBlock2D"] * 2}, "down_block_types has 2 items for the 3"),
        ({"down_block_types": ["UpBlock2D"] * 3}, "'UpBlock2D' is none of"),
        ({"up_block_types": ["AttnUpBlock2D"] * 3}, "reads no context"),
        ({"cross_attention_dim": None, "up_block_types": ["CrossAttnUpBlock2D"] * 3}, "give cross_attention_dim"),
        ({"norm_num_groups": 5}, "16 does not divide into norm_num_groups=5"),
        ({"attention_head_dim": 5}, "32 channels do not divide into 5 heads"),
        ({"attention_head_dim": [1, 2]}, "one for each of 3 levels"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
        ({"addition_embed_type": "text_time", "addition_time_embed_dim": 8}, "pooled_dim and size_ids"),
    ]:
        sizeless = {k: v for k, v in config.items() if not k.startswith(("addition", "projection"))}
        with pytest.raises(ValueError, match=told):
            UNet(**sizeless | wrong)
