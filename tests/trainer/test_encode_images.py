"""Pictures' embeddings, encoded once or on the fly, beside text; encodings in a bucket; videos."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from conf.compose import compose
from conf.errors import ConfigError
from conf.schema import build
from data.encoded import read_stored
from data.run_directory import read_jsonl
from models.image import ImageEncoder
from tests.data.curation.drawn_clips import encode as encode_clip
from tests.data.curation.drawn_clips import moving, texture
from tests.data.curation.tiny_models import save_clip
from tests.data.shard_files import write_tar
from tests.models.test_text import LENGTH
from tests.models.test_text import save_clip as save_clip_text
from tests.trainer.jobs import SMALL, train_on
from tests.trainer.ranks import ranks
from tests.trainer.test_encode import (
    BASE,
    STEPS,
    encode_here,
    encoded_folder,
    files,
    places,
    samples,
    scene,
    train_here,
    write_shards,
)
from trainer.encode import preflight


def both(folder: Path, image: str = "clip", *more: str) -> list[str]:
    """The overrides of a run whose conditioner reads pictures and captions."""
    encoders = (
        f"{{_target_: models.image.ImageEncoder, model: '{folder}/{image}'}}",
        f"{{_target_: models.text.ClipEncoder, model: '{folder}/words', subfolder: text_encoder,"
        f" tokenizer_subfolder: tokenizer, length: {LENGTH}}}",
    )
    conditioner = ["conditioner=clip_image", f"conditioner.encoders=[{', '.join(encoders)}]"]
    widths = ["model.joint_attention_dim=10", "model.pooled_projection_dim=18"]
    return [*BASE, *conditioner, *widths, *places(folder), *more]


def encode_on(world: int, arguments: list[str]) -> None:
    assert ranks(world).run(encode_here, arguments) == [""] * world


def trained(world: int, folder: Path, name: str, *arguments: str) -> list[float]:
    """The losses of a run's steps, then of its validation."""
    rows = train_on(world, folder, *arguments, f"name={name}")
    return [row["loss"] for row in rows] + [row["val/loss"] for row in rows if "val/loss" in row]


def refusal(*arguments: str) -> str:
    return ranks(1).run(train_here, [*SMALL, *arguments, "name=refused"])[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_shards(folder)
    save_clip(folder / "clip")
    torch.manual_seed(0)
    save_clip_text(folder / "words", "", width=8, projection=8, act="gelu")
    encode_on(2, both(folder, "clip", "data.encoded=whole", "encode.dtype=float32", "encode.batch=5"))
    return folder


@pytest.fixture(scope="module")
def on_the_fly(folder) -> list[float]:
    return trained(1, folder, "fly", *both(folder))


def test_training_from_encodings_of_pictures_and_captions_equals_encoding_on_the_fly(folder, on_the_fly):
    assert len(on_the_fly) == STEPS + 1
    assert trained(1, folder, "whole", *both(folder, "clip", "data.encoded=whole")) == pytest.approx(
        on_the_fly, rel=1e-5
    )
    assert trained(2, folder, "two", *both(folder, "clip", "data.encoded=whole")) == pytest.approx(on_the_fly, rel=1e-4)
    encode_on(1, both(folder, "clip", "data.encoded=half", "encode.batch=5"))
    drawing = ("samples.every=10", "samples.count=2")  # from the pictures themselves, though training reads none
    half = trained(1, folder, "half", *both(folder, "clip", "data.encoded=half", *drawing))
    assert half == pytest.approx(on_the_fly, rel=1e-3)
    assert (folder / "runs/half/samples/step_00000010.png").stat().st_size > 100


def test_embeddings_alone_can_be_encoded_and_pictures_are_read_for_latents(folder, on_the_fly):
    encode_on(1, both(folder, "clip", "data.encoded=alone", "encode.latents=false", "encode.dtype=float32"))
    members = {name for sample in samples(folder, "alone").values() for name in sample}
    assert members == {f"{name}.safetensors" for name in ("image", "image_flipped", "text0", "text1")}
    losses = trained(1, folder, "alone", *both(folder, "clip", "data.encoded=alone"))
    assert losses == pytest.approx(on_the_fly, rel=1e-5)


def test_embeddings_are_those_of_the_very_crops_mirrored_where_these_are(folder):
    config = compose("train", both(folder, "clip", "data.encoded=whole"))
    data, buckets = build(config.data), build(config.buckets)
    plain = data.open(buckets)
    plan = plain.plan(1, 8, seed=0)
    pictures = plain.loader(plan, range(1), workers=0)
    stored = read_stored(data.manifests("s")[0], "whole", data.store)
    assert stored is not None
    data.encodings = {"s": stored.encoding}
    encoded = data.open(buckets).loader(plan, range(1), workers=0)
    encoder = ImageEncoder(str(folder / "clip")).requires_grad_(False)
    flips = set()
    for step in range(4):
        (seen,), (read,) = pictures.step(step), encoded.step(step)
        assert seen.keys == read.keys and read.images.shape[1] == 0
        sequence, pooled = encoder(seen.images)
        torch.testing.assert_close(read.fields["encoder/0/sequence"], sequence, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(read.fields["encoder/0/pooled"], pooled, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(encoder(seen.images.flip(-1))[1], pooled, rtol=1e-3, atol=1e-4)
        flips |= set(read.fields["flip"].tolist())
    assert flips == {False, True}
    nulls = load((encoded_folder(folder, "whole") / "null.safetensors").read_bytes())
    assert not nulls["0.pooled"].any() and nulls["1.pooled"].any()


def test_another_image_encoder_or_latents_alone_are_refused(folder):
    save_clip(folder / "other", seed=5)
    assert "another conditioner's: encoder 0" in refusal(*both(folder, "other", "data.encoded=whole"))
    text_only = [*BASE, *places(folder), "model.joint_attention_dim=64", "model.pooled_projection_dim=64"]
    latents = [*text_only, "conditioner=none", "data.encoded=latents"]
    encode_on(1, latents)
    assert "holds latents alone" in refusal(*both(folder, "clip", "data.encoded=latents"))
    for more, named in [
        ("encode.conditions=false", "encode.conditions=false: the conditioner embeds pictures"),
        ("data.crop=random", "data.crop=random"),
        ("data.sources.s.manifest=clips", "data.sources.s.manifest=clips"),
    ]:
        config = compose("encode", both(folder, "clip", "data.encoded=x", "encode.latents=true", more))
        with pytest.raises(ConfigError, match=named):
            preflight(config, 1)
    nothing = [*latents, "data.encoded=nothing", "encode.latents=false"]
    assert "there is nothing to encode" in ranks(1).run(encode_here, nothing)[0]


def test_videos_are_refused_before_anything_is_written(tmp_path, folder):
    clip = encode_clip(moving(texture(0), 5, right=2.0))
    write_tar(tmp_path / "shards" / "0.tar", [("a.png", scene(0)), ("a.json", b'{"other": "a"}'), ("b.mp4", clip)])
    arguments = [*both(folder), *places(tmp_path), "data.holdout=0"]
    (refused,) = ranks(1).run(encode_here, [*arguments, "data.encoded=some"])
    assert "1 of 2 samples selected of" in refused and "are videos" in refused
    assert not encoded_folder(tmp_path, "some").exists()
    encode_on(1, [*arguments, "data.encoded=some", "data.sources.s.where=duration is null"])
    assert samples(tmp_path, "some").keys() == {"a"}


def test_a_bucket_is_encoded_and_trained_from_there(tmp_path, folder, on_the_fly):
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    try:
        secrets = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=endpoint, **secrets)
        client.create_bucket(Bucket="bucket")
        for path in (folder / "shards").glob("*.tar"):
            client.put_object(Bucket="bucket", Key=f"shards/{path.name}", Body=path.read_bytes())
        arguments = [
            *both(folder, "clip", "data.encoded=whole"),
            *(
                f"data.cache_folder={tmp_path}/cache",
                f"runs={tmp_path}/runs",
                "data.sources.s.shards=s3://bucket/shards",
            ),
            f"data.storage_options={{s3: {{endpoint_url: '{endpoint}', key: x, secret: x}}}}",
        ]
        job = [*arguments, "encode.dtype=float32", "encode.batch=5"]
        encode_on(2, job)

        def listed() -> dict[str, tuple[str, object]]:
            found = client.list_objects_v2(Bucket="bucket", Prefix="shards/encoded-whole/")["Contents"]
            return {o["Key"].rpartition("/")[2]: (o["ETag"], o["LastModified"]) for o in found}

        first, local = listed(), files(folder, "whole")
        assert first.keys() == local.keys()
        for name, content in local.items():
            body = client.get_object(Bucket="bucket", Key=f"shards/encoded-whole/{name}")["Body"].read()
            assert body == content or name.endswith(".parquet")  # which names the state of its shard
        encode_on(1, job)
        assert listed() == first
        losses = ranks(1).run(train_here, [*SMALL, *arguments, "name=remote"])
        assert losses == [""]
        rows = read_jsonl(tmp_path / "runs" / "remote" / "metrics.jsonl")
        assert [row["loss"] for row in rows] == pytest.approx(on_the_fly[:STEPS], rel=1e-5)
    finally:
        server.stop()
