"""Training a CLIP: its loss against transformers', on any ranks and engine, resumed; what a finished run leaves."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import CLIPModel

from data.batch import Batch
from data.curation.clip import Embedder
from data.draws import slice_draws
from models.clip import CLIP
from models.image import ImageEncoder
from models.initialization import initialize
from models.text import ClipEncoder
from models.text_training import train_clip_tokenizer
from tests.models.test_clip_towers import CAPTIONS, TEXT, VISION
from tests.trainer.jobs import QUICK, train_on
from tests.trainer.ranks import ranks
from tools import cli
from tools.demo.scenes import write_tars
from trainer.checkpoint import load_weights
from trainer.objectives.contrastive import Contrastive, _HeldBelow

COMPARED = ("loss", "grad_norm", "contrast/scale", "contrast/image_to_text", "val/loss", "val/text_to_image")
TINY = [
    *("experiment=demo/clip", "scale=tiny", *QUICK, "data.holdout=0.2", "batch=8", "lanes=4", "steps=4"),
    *("validation.every=2", "validation.samples=10", "checkpoint.every=2", "schedule=constant"),
    *("schedule.warmup=0", "schedule.lr=1e-3"),
]


def batch_of(captions: list[str], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    n = len(captions)
    return Batch(
        draws=slice_draws(0, 0, 0, n),
        keys=[str(i) for i in range(n)],
        captions=captions,
        images=torch.randint(0, 256, (n, 3, 24, 24), generator=generator, dtype=torch.uint8),
        original_size=torch.tensor([[24, 24]] * n),
        crop=torch.zeros(n, 2, dtype=torch.int64),
    )


def tiny_clip(folder: Path) -> CLIP:
    if not (folder / "tokenizer").exists():
        train_clip_tokenizer(CAPTIONS, folder / "tokenizer", 600, 16)
    return initialize(CLIP(VISION, TEXT, 20, tokenizer=str(folder / "tokenizer")), seed=1)


def test_the_loss_and_its_gradients_are_transformers_own(tmp_path):
    network, objective, batch = tiny_clip(tmp_path), Contrastive(), batch_of([*CAPTIONS, "red"])
    network.save(tmp_path / "saved", network.state_dict())
    theirs = CLIPModel.from_pretrained(tmp_path / "saved")
    pixels = network.prepare(batch.images)
    expected = theirs(input_ids=network.tokens(batch.captions), pixel_values=pixels, return_loss=True)
    expected.loss.backward()
    losses = objective.losses(objective.phases[0], {"clip": network}, batch)
    losses.per_sample.mean().backward()
    assert losses.per_sample.mean().item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert losses.logs["scale"][0].item() == pytest.approx(math.exp(2.6592), rel=1e-6)
    found = expected.logits_per_image.argmax(1) == torch.arange(4)
    assert torch.equal(losses.logs["image_to_text"], found.float())
    of_theirs = dict(theirs.named_parameters())
    for name, parameter in network.named_parameters():
        gradient = of_theirs[name].grad.reshape(parameter.shape)
        assert (parameter.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7, (
            name
        )  # a key's bias has none


def losses_of_part(folder: str) -> tuple[list[float], list[torch.Tensor]]:
    """This rank's losses of its part of a batch of eight, and gradients summed over ranks."""
    network, objective = tiny_clip(Path(folder)), Contrastive(largest_scale=10.0)
    size = 8 // dist.get_world_size()
    part = batch_of([f"{caption} {i}" for i in range(4) for caption in CAPTIONS[:2]]).split(size)[dist.get_rank()]
    losses = objective.losses(objective.phases[0], {"clip": network}, part)
    (losses.per_sample.sum() / 8).backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return losses.per_sample.tolist(), gradients


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_compare_all_of_the_batch(tmp_path, world):
    tiny_clip(tmp_path)
    ((one, gradients),) = ranks(1).run(losses_of_part, str(tmp_path))
    results = ranks(world).run(losses_of_part, str(tmp_path))
    assert [loss for losses, _ in results for loss in losses] == pytest.approx(one, rel=1e-5)
    for ours, theirs in zip(results[0][1], gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-7


def test_the_temperature_stays_in_bounds_and_comes_back():
    value = torch.tensor([2.0], requires_grad=True)
    for bound, gradient, expected in ((1.5, -1.0, 0.0), (1.5, 1.0, 1.0), (2.5, -1.0, -1.0)):
        value.grad = None
        held = _HeldBelow.apply(value, bound)
        held.backward(torch.tensor([gradient]))
        assert held.item() == min(2.0, bound) and value.grad.item() == expected, (bound, gradient)
    with pytest.raises(ValueError, match=r"objective\.largest_scale is 0"):
        Contrastive(0.0)


def test_held_out_samples_are_compared_with_each_other():
    """By counting: five pairs, of which two have one caption."""
    rng = np.random.default_rng(0)
    images, texts = (torch.from_numpy(rng.normal(size=(5, 4))) for _ in range(2))
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    texts[1] = texts[0]
    tokens = torch.tensor([[0, 5, 1], [0, 5, 1], [0, 6, 1], [0, 7, 1], [0, 8, 1]])
    rows = {"images": images, "texts": texts, "tokens": tokens, "scale": torch.full((5, 1), 7.0)}
    told = Contrastive().compare(rows)
    cosines = (images @ texts.T).numpy()
    of_pictures = [int(tokens[i, 1] == tokens[cosines[i].argmax(), 1]) for i in range(5)]
    of_captions = [int(tokens[i, 1] == tokens[cosines[:, i].argmax(), 1]) for i in range(5)]
    assert told["image_to_text"] == sum(of_pictures) / 5 and told["text_to_image"] == sum(of_captions) / 5
    assert told["chance"] == (2 + 2 + 1 + 1 + 1) / 25
    e = np.exp(7 * cosines)
    expected = [-(math.log(e[i, i] / e[i].sum()) + math.log(e[i, i] / e[:, i].sum())) / 2 for i in range(5)]
    assert told["loss"] == pytest.approx(sum(expected) / 5, rel=1e-9)
    order = [3, 0, 4, 1, 2]
    assert Contrastive().compare({k: v[order] for k, v in rows.items()}) == pytest.approx(told)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("contrastive")
    write_tars(folder / "scenes", 80, seed=0)
    return folder


def run(world: int, folder: Path, name: str, *overrides: str) -> list[dict]:
    source = f"data.sources.scenes.shards={folder}/scenes"
    return train_on(world, folder, f"name={name}", source, *overrides, small=TINY)


@pytest.fixture(scope="module")
def alone(folder) -> list[dict]:
    return run(1, folder, "alone")


@pytest.mark.parametrize(
    ("name", "world", "layout"),
    [
        ("fsdp", 2, ["engine=fsdp"]),
        ("zero2", 2, ["engine=deepspeed", "engine.stage=2"]),
        ("zero3", 2, ["engine=deepspeed", "engine.stage=3"]),
        pytest.param("four", 4, ["engine=fsdp"], marks=pytest.mark.slow),
    ],
)
def test_ranks_train_as_one_resumed(folder, alone, name, world, layout):
    run(world, folder, name, *layout, "steps=2")
    rows = run(world, folder, name, *layout)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    compared = 0
    for ours, theirs in zip(rows, alone, strict=True):
        for key in COMPARED:
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (key, ours["step"])
                compared += 1
    assert compared == 4 * 4 + 2 * 2


def test_resumed_is_bit_equal_to_uninterrupted(folder, alone):
    run(1, folder, "resumed", "steps=2")
    rows = run(1, folder, "resumed")
    for ours, theirs in zip(rows, alone, strict=True):
        assert all(ours[key] == theirs[key] for key in COMPARED if key in theirs)
    for file in ("model.safetensors", "tokenizer.json"):
        one, other = ((folder / "runs" / run / "clip" / file).read_bytes() for run in ("resumed", "alone"))
        assert one == other


def test_a_finished_run_is_a_folder_that_embeds(folder, alone):
    own = folder / "runs" / "alone"
    weights = load_weights(own / "checkpoints" / "step_00000004", "clip")
    theirs = CLIPModel.from_pretrained(own / "clip")
    assert all(torch.equal(one.reshape(-1), weights[name].reshape(-1)) for name, one in theirs.state_dict().items())
    embedder = Embedder(own / "clip", "float32", "cpu")
    vision, text = theirs.config.vision_config.to_dict(), theirs.config.text_config.to_dict()
    network = CLIP(vision, text, theirs.config.projection_dim, tokenizer=str(own / "tokenizer"))
    network.load_state_dict(weights)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    captions = ["a red circle in the centre", "blue square, top left"]
    with torch.no_grad():
        x, y, _ = network(network.prepare(torch.from_numpy(pictures).permute(0, 3, 1, 2)), network.tokens(captions))
    assert np.allclose(embedder.images(list(pictures)), F.normalize(x, dim=1), atol=1e-5)
    assert np.allclose(embedder.texts(captions), F.normalize(y, dim=1), atol=1e-5)
    # Conditioners, `encode` and the features of `evaluate` read it too.
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    assert torch.allclose(ImageEncoder(str(own / "clip"))(images)[1], x, atol=1e-5)
    assert torch.allclose(ClipEncoder(str(own / "clip"), length=16)(captions)[1], y, atol=1e-5)


def test_a_run_begins_from_a_folder_and_is_exported_as_one(folder, alone, tmp_path):
    begun = run(1, folder, "begun", f"init_from={folder}/runs/alone/clip", "steps=1", "schedule.lr=0.0")
    source = f"source={folder}/runs/begun/checkpoints/step_00000001"
    assert cli.execute(["export", source, f"out={tmp_path}/out", "dtype=bfloat16", "shard_bytes=100000"]) == 0
    ours, theirs = (CLIPModel.from_pretrained(path) for path in (tmp_path / "out", folder / "runs/alone/clip"))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name].float(), tensor.bfloat16().float()), name
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert Embedder(tmp_path / "out", "float32", "cpu").texts(["a red circle"]).shape == (1, 32)
    assert begun[0]["loss"] != alone[0]["loss"]
