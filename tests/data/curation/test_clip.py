"""Embeddings, similarities and heads: against transformers and torch on tiny random models."""

import io
import pickle
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from drawn_clips import decode, encode, moving, texture
from PIL import Image
from safetensors.torch import save_file
from shard_files import as_json, picture, write_tar
from tiny_models import LENGTH, drop_weight, save_clip, save_siglip
from torch import nn

from data.curate import Settings, curate, recipe
from data.curation.base import Media
from data.curation.clip import Clip, Embedder
from data.curation.heads import EmbeddingHead, Head
from data.curation.sharpness import Sharpness
from data.index import ensure_indexed
from data.manifest import Manifest
from data.scores import score_url
from data.selection import select
from data.store import Store

CAPTIONS = ["a red circle", "blue squares", "", "a very long green triangle at the bottom of it all and more of it"]
SIZES = [(40, 30), (24, 24), (200, 3), (31, 57)]


def pictures() -> list[bytes]:
    return [picture(*size, form="PNG", seed=i) for i, size in enumerate(SIZES)]


def samples(side: int = 512) -> list[Media]:
    return [
        Media(f"{i}", {"caption": caption}, "image", data, side)
        for i, (caption, data) in enumerate(zip(CAPTIONS, pictures(), strict=True))
    ]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory) -> Path:
    return save_siglip(tmp_path_factory.mktemp("siglip"))


def expected(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of pictures and of captions by transformers' whole model, from Pillow's pictures one by one."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images, texts = [], []
    for data, caption in zip(pictures(), CAPTIONS, strict=True):
        pixels = processor(Image.open(io.BytesIO(data)), return_tensors="pt").pixel_values
        full = model.config.model_type == "siglip"
        ids = tokenizer(
            [caption], padding="max_length" if full else False, max_length=LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            output = model(input_ids=ids, pixel_values=pixels)
        images.append(output.image_embeds[0])
        texts.append(output.text_embeds[0])
    return torch.stack(images), torch.stack(texts)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embeddings_and_similarities_are_those_of_the_whole_model(kind, request):
    folder = request.getfixturevalue(f"{kind}_folder")
    images, texts = expected(folder)
    embedder = Embedder(folder, "float32", "cpu")
    np.testing.assert_allclose(embedder.images([s.image for s in samples()]), images, atol=1e-5)
    np.testing.assert_allclose(embedder.texts(CAPTIONS), texts, atol=1e-5)
    assert (images[0] - images[1]).norm() > 1e-3  # random weights tell the pictures apart

    scored = Clip(str(folder), device="cpu").score(samples())
    width = images.shape[1]
    assert {len(row["clip_embedding"]) for row in scored} == {width}
    np.testing.assert_allclose([row["clip_embedding"] for row in scored], images, atol=1e-3)
    similarity = [row["clip_similarity"] for row in scored]
    assert similarity[2] is None  # no caption
    for i in (0, 1, 3):
        assert similarity[i] == pytest.approx(float(images[i] @ texts[i]), abs=1e-5)


def test_half_precision_is_near_full(clip_folder):
    full, half = (
        Embedder(clip_folder, dtype, "cpu").images([s.image for s in samples()]) for dtype in ("float32", "bfloat16")
    )
    assert not np.array_equal(full, half)
    assert ((full * half).sum(axis=1) > 0.999).all()


def test_a_model_of_pictures_alone_gives_its_pooled_output_and_no_similarity(tmp_path):
    from transformers import CLIPImageProcessorPil, ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=24, patch_size=8
    )
    model = ViTModel(config)
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor.save_pretrained(tmp_path)
    found = Clip(str(tmp_path), similarity=False, device="cpu").score(samples())
    pixels = processor(
        [s.image for s in samples()], return_tensors="pt", input_data_format="channels_last"
    ).pixel_values
    with torch.no_grad():
        pooled = nn.functional.normalize(model.eval()(pixel_values=pixels).pooler_output, dim=-1)
    np.testing.assert_allclose([row["clip_embedding"] for row in found], pooled, atol=1e-3)
    with pytest.raises(ValueError, match="holds a ViTModel, which embeds no captions"):
        Clip(str(tmp_path), device="cpu").score(samples())


def test_what_changes_scores_is_in_the_settings(clip_folder, tmp_path):
    copy = shutil.copytree(clip_folder, tmp_path / "elsewhere")
    base = Clip(str(clip_folder)).settings()
    assert Clip(str(copy), device="cpu").settings() == base
    assert Clip(str(clip_folder), dtype="bfloat16").settings() != base
    assert Clip(str(save_clip(tmp_path / "other", seed=5))).settings() != base


def test_scores_of_models_depend_on_the_batch_and_others_do_not(clip_folder):
    clip, sharpness = Clip(str(clip_folder), device="cpu"), Sharpness()
    assert recipe(clip, Settings(batch=7)) != recipe(clip, Settings(batch=8))
    assert recipe(sharpness, Settings(batch=7)) == recipe(sharpness, Settings(batch=8))


def test_models_that_are_not_whole_are_refused(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="no model '/nowhere/at/all'"):
        Clip("/nowhere/at/all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty cannot be loaded"):
        Clip(str(tmp_path / "empty"))
    partial = shutil.copytree(clip_folder, tmp_path / "partial")
    drop_weight(partial, "visual_projection.weight")
    with pytest.raises(ValueError, match=r"lacks 1 of the weights of CLIPModel, such as visual_projection\.weight"):
        Clip(str(partial), device="cpu").score(samples())
    pickled = shutil.copytree(clip_folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled cannot be loaded"):
        Clip(str(pickled), device="cpu").score(samples())


def test_a_folder_in_one_variant_alone_is_opened(clip_folder, tmp_path):
    variant = shutil.copytree(clip_folder, tmp_path / "variant")
    (variant / "model.safetensors").rename(variant / "model.fp16.safetensors")
    plain, other = (Embedder(folder, "float32", "cpu").texts(CAPTIONS) for folder in (clip_folder, variant))
    assert np.array_equal(plain, other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named(clip_folder):
    with pytest.raises(ValueError, match="finds no GPU"):
        Clip(str(clip_folder), device="cuda").score(samples())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_embeds_as_a_cpu_does(clip_folder):
    shown = [s.image for s in samples()]
    cpu, gpu = (Embedder(clip_folder, "float32", device).images(shown) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu, cpu, atol=1e-4)


# --- heads --------------------------------------------------------------------------------------------------------


def aesthetic_mlp(width: int) -> nn.Sequential:
    """The layers of improved-aesthetic-predictor."""
    sizes = [width, 1024, 128, 64, 16]
    layers: list[nn.Module] = []
    for n, m in pairwise(sizes[:4]):
        layers += [nn.Linear(n, m), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(64, 16), nn.Linear(16, 1))


def safety_mlp(width: int) -> nn.Sequential:
    """A network like LAION's safety classifier for ViT-H/14: activation and dropout between layers but the last."""
    return nn.Sequential(
        nn.Linear(width, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 16), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(16, 8), nn.Linear(8, 1),
    )  # fmt: skip


def save_head(module: nn.Module, path: Path, prefix: str = "") -> Path:
    state = {prefix + key: value.clone() for key, value in module.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("module", "prefix", "options"),
    [
        (nn.Linear(10, 1), "", {}),
        (aesthetic_mlp(10), "layers.", {}),
        (safety_mlp(10), "layers.", {"activation": "relu", "sigmoid": True}),
    ],
    ids=["linear", "aesthetic", "safety"],
)
def test_a_head_is_the_network_that_its_weights_come_from(tmp_path, suffix, module, prefix, options):
    head = Head(str(save_head(module, tmp_path / f"head{suffix}", prefix)), **options)
    embeddings = nn.functional.normalize(torch.randn(20, 10), dim=-1)
    with torch.no_grad():
        plain = module.eval()(embeddings)[:, 0]
    plain = plain.sigmoid() if options.get("sigmoid") else plain
    assert head.width == 10
    np.testing.assert_allclose(head(embeddings.numpy()), plain, rtol=1e-5, atol=1e-6)


class _Code:
    def __reduce__(self):
        return print, ("code was run",)


def test_what_is_no_head_is_refused(tmp_path, capsys, clip_folder):
    torch.save({"weight": _Code()}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth holds no weights that can be read"):
        Head(str(tmp_path / "code.pth"))
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"nowhere\.pth holds no weights that can be read"):
        Head(str(tmp_path / "nowhere.pth"))
    wrong = {
        "two outputs": (nn.Linear(10, 2), "no chain of linear layers that ends in one number"),
        "no bias": (nn.Linear(10, 1, bias=False), "no chain of linear layers"),
        "norm": (nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 1)), "no chain of linear layers"),
        "batch norm": (nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 1)), "no head of linear layers: it holds '0."),
        "unchained": (nn.Sequential(nn.Linear(10, 4), nn.Linear(5, 1)), "no chain of linear layers"),
    }
    for name, (module, words) in wrong.items():
        path = save_head(module, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=words):
            Head(str(path))
    wide = Head(str(save_head(nn.Linear(512, 1), tmp_path / "wide.pth")))
    with pytest.raises(ValueError, match="clip_nsfw: the head takes embeddings of 512 numbers"):
        Clip(str(clip_folder), heads={"clip_nsfw": wide})


# --- the job ------------------------------------------------------------------------------------------------------


def test_a_clip_has_the_mean_of_three_of_its_frames(tmp_path, clip_folder):
    clip = encode([*moving(texture(1), 6, 0), *moving(texture(2), 6, 1), *moving(texture(3), 7, 0)])
    write_tar(tmp_path / "0.tar", [("a.mp4", clip), ("a.txt", b"a red circle"), ("b.jpg", picture(40, 30))])
    store = Store()
    manifests = ensure_indexed([str(tmp_path / "0.tar")], store)
    curate(manifests, [Clip(str(clip_folder), device="cpu")], store)
    embedder = Embedder(clip_folder, "float32", "cpu")
    frames = decode(clip)
    shown = embedder.images([frames[0], frames[9], frames[18]])
    mean = nn.functional.normalize(torch.from_numpy(shown.mean(axis=0)), dim=0)
    np.testing.assert_allclose(column(manifests, "clip", "clip_embedding")[0], mean, atol=5e-3)
    cosines = shown @ embedder.texts(["a red circle"])[0]
    assert column(manifests, "clip", "clip_similarity") == [pytest.approx(cosines.mean(), abs=5e-3), None]


def write_shards(folder: Path) -> list[Manifest]:
    """Two shards; in each a broken picture, one without a caption, and LAION's own aesthetic score in the JSON."""
    for shard in range(2):
        members = []
        for i in range(6):
            key = f"{shard}-{i}"
            data = b"\xff\xd8broken" if i == 4 else picture(30 + i, 40, seed=10 * shard + i)
            members += [(f"{key}.jpg", data), (f"{key}.json", as_json({"AESTHETIC_SCORE": i, "url": f"u{key}"}))]
            members += [(f"{key}.txt", b"a red circle")] if i != 2 else []
        write_tar(folder / f"{shard:05d}.tar", members)
    store = Store()
    return ensure_indexed(store.expand(str(folder)), store)


def column(manifests: list[Manifest], name: str, column: str) -> list:
    return [value for m in manifests for value in pq.read_table(score_url(m.url, name))[column].to_pylist()]


def test_one_pass_serves_all_columns_and_a_later_head_needs_none(tmp_path, clip_folder, monkeypatch):
    manifests = write_shards(tmp_path / "data")
    path = str(save_head(nn.Linear(10, 1), tmp_path / "head.pth"))
    settings, store = Settings(max_errors=0.2), Store()
    clip = Clip(str(clip_folder), heads={"clip_aesthetic": Head(path)}, device="cpu")
    passes = []
    images = Embedder.images
    monkeypatch.setattr(
        Embedder, "images", lambda self, pictures: passes.append(len(pictures)) or images(self, pictures)
    )
    later = EmbeddingHead("clip_later", Head(path))
    scored = curate(manifests, [clip, later], store, settings)
    assert passes == [5, 5]
    assert {name: [dict(s.error_counts) for s in files] for name, files in scored.items()} == {
        "clip": [{"undecodable picture": 1}] * 2,
        "clip_later": [{}] * 2,
    }
    direct, again = column(manifests, "clip", "clip_aesthetic"), column(manifests, "clip_later", "clip_later")
    missing = [i % 6 == 4 for i in range(12)]
    assert [value is None for value in direct] == [value is None for value in again] == missing
    assert [d for d in direct if d is not None] == pytest.approx([a for a in again if a is not None], abs=2e-3)
    assert [value is None for value in column(manifests, "clip", "clip_similarity")] == [
        i % 6 in (2, 4) for i in range(12)
    ]

    files = {path.name: path.read_bytes() for path in (tmp_path / "data").glob("*.clip*.parquet")}
    for path in (tmp_path / "data").glob("*.clip.parquet"):
        path.unlink()
    sent = pickle.dumps(clip)  # as to a task's process: the model goes by its folder
    assert len(sent) < 10_000
    curate(manifests, [pickle.loads(sent), later], store, settings)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").glob("*.clip*.parquet")} == files

    chosen = select(
        manifests, store, "clip_aesthetic >= quantile(0.5) AND aesthetic_score < 4", cache_folder=str(tmp_path)
    )
    median = sorted(d for d in direct if d is not None)[4]
    kept = [i for i, d in enumerate(direct) if d is not None and d >= median and i % 6 < 4]
    assert [shard * 6 + row for shard, row in chosen.locate(np.arange(len(chosen)))] == kept


@pytest.mark.slow
def test_the_command_line_embeds_judges_and_groups_in_one_go(tmp_path, clip_folder):
    manifests = write_shards(tmp_path / "data")
    path = save_head(nn.Linear(10, 1), tmp_path / "head.safetensors")
    command = [
        f"shards={tmp_path / 'data'}",
        "filter=[clip,aesthetic,semantic_duplicates]",
        f"filter.clip.model={clip_folder}",
        f"+filter.clip.heads.clip_direct={{_target_: data.curation.heads.Head, path: {path}}}",
        f"filter.aesthetic.head.path={path}",
        "filter.semantic_duplicates.best=clip_aesthetic",
        f"filter.semantic_duplicates.scratch={tmp_path}",
        "max_errors=0.2",
        "log.wandb=null",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", "curate", *command], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "clip: 2 of 2 shards scored, 2 errors" in done.stdout
    assert "clip_aesthetic: 2 of 2 shards scored, 0 errors" in done.stdout
    later, direct = column(manifests, "clip_aesthetic", "clip_aesthetic"), column(manifests, "clip", "clip_direct")
    judged = [i for i in range(12) if i % 6 != 4]
    assert [later[i] for i in judged] == pytest.approx([direct[i] for i in judged], abs=2e-3)
    ranks = column(manifests, "semantic_duplicates", "semantic_rank")
    assert [rank is None for rank in ranks] == [i % 6 == 4 for i in range(12)]
    assert min(judged, key=lambda i: -later[i]) in [i for i in judged if ranks[i] == 0]
