"""The validation set against a list of what is held out, and its loss at 1, 2 and 3 ranks against a plain mean."""

import io
import math
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from data.buckets import BucketList
from data.manifest_reader import ManifestReader
from data.tars import Source, TarData, TarSplit
from models.initialization import initialize
from tests.trainer.ranks import ranks
from tests.trainer.toys import ADVERSARIAL, OPTIMIZER, Generator, ValidatedAdversarial, pixels, toy_networks
from tools.demo.scenes import write_tars
from trainer.ema import Ema
from trainer.engines.fsdp import FSDP
from trainer.validation import Validation, validation_batches

BUCKETS = [[32, 32], [28, 36], [36, 28]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two sources, in several shards each."""
    folder = tmp_path_factory.mktemp("validation")
    write_tars(folder / "many", 100, seed=0, per_shard=40)
    write_tars(folder / "few", 30, seed=1, per_shard=20)
    return folder


def held_out(folder: Path, holdout: float = 0.3, names: tuple[str, ...] = ("many", "few")) -> TarSplit:
    sources = {name: Source(str(folder / name), weight=i + 1.0) for i, name in enumerate(names)}
    data = TarData(sources, holdout=holdout, cache_folder=str(folder / "cache"))
    return data.open(BucketList(BUCKETS), "validation")


def all_keys(split: TarSplit) -> Counter:
    """What is held out, straight from the manifests."""
    found: Counter = Counter()
    for selection in split.selections.values():
        reader = ManifestReader(split.data.store, selection.manifests, selection.digests)
        for shard, row in selection.locate(torch.arange(len(selection)).numpy()):
            found.update(reader.rows(shard, [row], ["key"])["key"])
    return found


def drawn(split: TarSplit, samples: int, size: int, world: int) -> list[dict[str, torch.Tensor]]:
    """By rank: noise by key and caption. Shapes and numbers of batches are checked."""
    shares = []
    counts = set()
    for rank in range(world):
        batches = validation_batches(split, samples, size, rank, world)
        counts.add(len(batches))
        assert all(len(batch) == size and len(batch.images) == size for batch in batches)
        noise = {}
        for batch in batches:
            for i, key in enumerate(batch.keys):
                if key:
                    name = f"{key} {batch.captions[i]}"  # keys of the two sources are alike
                    assert name not in noise
                    noise[name] = batch.draws[i : i + 1].normal("noise", (3,))
        shares.append(noise)
    assert len(counts) == 1 and counts.pop() > 0
    return shares


def together(shares: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    whole = {key: noise for share in shares for key, noise in share.items()}
    assert len(whole) == sum(len(share) for share in shares), "a sample counts twice"
    return whole


def test_validation_goes_without_sources_that_hold_nothing_out(folder, caplog):
    write_tars(folder / "single", 1, seed=2)
    split = held_out(folder, names=("single", "many"))
    assert list(split.selections) == ["many"] and "source 'single'" in caplog.text
    alone = held_out(folder, names=("many",))
    assert together(drawn(split, 7, 4, 2)).keys() == together(drawn(alone, 7, 4, 2)).keys()
    plan = split.plan(lanes=2, slice_size=1, seed=0)
    batches = split.loader(plan, range(2), workers=0).step(0)
    assert {key for batch in batches for key in batch.keys} <= set(all_keys(alone))


def test_sources_of_which_none_holds_anything_out_are_told_what_to_set(folder):
    with pytest.raises(ValueError, match=r"data\.holdout=1e-09.*raise it, or set it to 0"):
        held_out(folder, holdout=1e-9)


def test_every_held_out_sample_counts_once(folder):
    split = held_out(folder)
    expected = all_keys(split)
    assert len(split.shares()) == 3 and expected.total() > 25
    for size in (1, 3, 4, 32):
        for world in (1, 2, 3):
            found = together(drawn(split, 1000, size, world))
            assert Counter(name.split(" ")[0] for name in found) == expected


def test_the_first_n_are_the_same_with_the_same_noise_for_any_slices_and_ranks(folder):
    split = held_out(folder)
    everything = together(drawn(split, 1000, 4, 1))
    smaller: set[str] = set()
    for samples in (1, 7, 20):
        sets = []
        for size in (1, 3, 4):
            for world in (1, 2, 3):
                found = together(drawn(split, samples, size, world))
                assert all(torch.equal(noise, everything[name]) for name, noise in found.items())
                sets.append(set(found))
        assert all(found == sets[0] for found in sets) and len(sets[0]) == samples
        assert smaller <= sets[0], "more samples are the same and further ones"
        smaller = sets[0]
    # Of both sources in about the proportion they have, not one after the other.
    few = set(together(drawn(held_out(folder, names=("few",)), 1000, 4, 1)))
    assert 0 < len(smaller & few) < 15
    noises = {tuple(noise.flatten().tolist()) for noise in everything.values()}
    assert len(noises) == len(everything), "every sample has noise of its own"


def test_a_split_smaller_than_the_world(folder):
    split = held_out(folder, 0.06, ("few",))
    expected = all_keys(split)
    assert 0 < expected.total() < 3
    shares = drawn(split, 1000, 4, 3)
    assert Counter(name.split(" ")[0] for name in together(shares)) == expected
    assert any(not share for share in shares)


def test_a_sample_that_cannot_be_read_is_left_out(folder, tmp_path, caplog):
    shutil.copytree(folder / "few", tmp_path / "few")
    whole = together(drawn(held_out(tmp_path, names=("few",)), 1000, 4, 1))
    # The same tars with one held-out picture of other bytes.
    spoilt = next(iter(whole)).split(" ")[0]
    for path in (tmp_path / "few").glob("*.tar"):
        with tarfile.open(path) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
        with tarfile.open(path, "w") as tar:
            for member, content in members:
                wrong = member.name.startswith(f"{spoilt}.") and not member.name.endswith((".txt", ".json"))
                tar.addfile(member, io.BytesIO(bytes(len(content)) if wrong else content))
    found = together(drawn(held_out(tmp_path, names=("few",)), 1000, 4, 2))
    assert {name for name in whole if name not in found} == {n for n in whole if n.startswith(f"{spoilt} ")}
    assert spoilt in caplog.text


def validate(folder: Path, samples: int, size: int, holdout: float) -> dict[str, float]:
    networks = toy_networks(ADVERSARIAL)
    optimizers = {phase.name: OPTIMIZER for phase in ADVERSARIAL}
    engine = FSDP(precision="fp32").build(networks, ADVERSARIAL, optimizers, 7, torch.device("cpu"))
    ema = Ema({})
    ema.attach(engine)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = validation_batches(held_out(folder, holdout), samples, size, rank, world)
    return Validation(batches)(ValidatedAdversarial(), engine, ema, None)


@pytest.mark.parametrize(("samples", "holdout"), [(1000, 0.3), (11, 0.3), (2, 0.3), (1000, 0.05)])
def test_the_loss_is_the_plain_mean_at_1_2_and_3_ranks(folder, samples, holdout):
    network = initialize(Generator(), 7, "generator")
    errors = []
    for batch in validation_batches(held_out(folder, holdout), samples, 1, 0, 1):
        with torch.no_grad():
            errors.append((network(pixels(batch)) - pixels(batch)).abs().mean().item())
    expected = math.fsum(errors) / len(errors)
    for world in (1, 2, 3):
        for answer in ranks(world).run(validate, folder, samples, 4, holdout):
            assert answer.keys() == {"val/loss", "val/squared"}
            assert answer["val/loss"] == pytest.approx(expected, rel=1e-6)
