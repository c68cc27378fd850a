"""Captions by tiny random models of real classes: as transformers writes them picture by picture; and in a mix."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_files import picture, write_tar
from tiny_models import save_blip, save_llava, save_vit_gpt2

from data.buckets import Square
from data.curate import curate
from data.curation.base import Media
from data.curation.captions import Captioner
from data.index import ensure_indexed
from data.store import Store
from data.tars import TarData

SIZES = [(40, 30), (24, 24), (31, 57), (90, 33), (20, 80)]


def samples() -> list[Media]:
    return [Media(f"{i}", {}, "image", picture(*size, form="PNG", seed=i), 512) for i, size in enumerate(SIZES)]


def captions(folder: Path, **options) -> list[str]:
    filter_ = Captioner(str(folder), tokens=6, batch=2, dtype="float32", device="cpu", **options)
    return [row["synthetic_caption"] for row in filter_.score(samples())]


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_blip_writes_what_it_writes_for_each_picture_alone(tmp_path, prompt):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    folder = save_blip(tmp_path)
    model, processor = BlipForConditionalGeneration.from_pretrained(folder), BlipProcessor.from_pretrained(folder)
    alone = []
    for sample in samples():
        inputs = processor(
            images=Image.fromarray(sample.image), **({"text": prompt} if prompt else {}), return_tensors="pt"
        )
        written = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        alone.append(processor.decode(written[0], skip_special_tokens=True))
    assert captions(folder, prompt=prompt) == alone
    assert len(set(alone)) > 1
    assert all(text.startswith(prompt) for text in alone)


def test_more_tokens_than_the_model_has_positions_for_are_refused_and_as_many_are_not(tmp_path):
    folder = save_blip(tmp_path)
    limit = json.loads((folder / "config.json").read_text())["text_config"]["max_position_embeddings"]
    with pytest.raises(ValueError, match=f"tokens={limit + 1}, after 1 .* the {limit} positions .* at most {limit}"):
        Captioner(str(folder), tokens=limit + 1, dtype="float32", device="cpu").score(samples())
    assert len(Captioner(str(folder), tokens=limit, dtype="float32", device="cpu").score(samples())) == len(SIZES)


def test_a_chat_model_answers_and_the_request_is_no_part_of_the_caption(tmp_path):
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    folder = save_llava(tmp_path)
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), LlavaProcessor.from_pretrained(folder)
    alone = []
    for sample in samples():
        text = "USER: <image> describe the picture ASSISTANT:"
        inputs = processor(images=Image.fromarray(sample.image), text=text, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answer = written[0, inputs.input_ids.shape[1] :]
        alone.append(" ".join(processor.decode(answer, skip_special_tokens=True).split()))
    assert captions(folder, prompt="describe the picture") == alone
    assert len(set(alone)) > 1


def test_a_model_writes_for_a_picture_in_a_batch_what_it_writes_for_it_alone(tmp_path):
    """Requests have unequal lengths, of which shorter ones are padded where no answer goes on from."""
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    folder = save_llava(tmp_path, tiled=True)
    model, processor = (
        LlavaNextForConditionalGeneration.from_pretrained(folder),
        LlavaNextProcessor.from_pretrained(folder),
    )
    alone, lengths = [], set()
    for sample in samples():
        text = "USER: <image> describe the picture ASSISTANT:"
        inputs = processor(images=Image.fromarray(sample.image), text=text, return_tensors="pt")
        lengths.add(inputs.input_ids.shape[1])
        written = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answer = written[0, inputs.input_ids.shape[1] :]
        alone.append(" ".join(processor.decode(answer, skip_special_tokens=True).split()))
    assert len(lengths) > 2 and len(set(alone)) > 1
    for batch in (1, 3, 5):
        filter_ = Captioner(
            str(folder), prompt="describe the picture", tokens=6, batch=batch, dtype="float32", device="cpu"
        )
        assert [row["synthetic_caption"] for row in filter_.score(samples())] == alone


def test_a_pair_of_encoder_and_decoder_writes_too(tmp_path):
    from transformers import AutoTokenizer, VisionEncoderDecoderModel, ViTImageProcessorPil

    folder = save_vit_gpt2(tmp_path)
    model = VisionEncoderDecoderModel.from_pretrained(folder)
    pixels = ViTImageProcessorPil.from_pretrained(folder)(
        [Image.fromarray(s.image) for s in samples()], return_tensors="pt"
    )
    written = model.generate(pixels.pixel_values, max_new_tokens=6, do_sample=False)
    assert captions(folder) == AutoTokenizer.from_pretrained(folder).batch_decode(written, skip_special_tokens=True)


def test_training_mixes_written_captions_with_those_of_the_data(tmp_path):
    rows, model = 600, save_blip(tmp_path / "model")
    members = [
        (f"{i:04d}.{kind}", data) for i in range(rows) for kind, data in (("png", _shade(i)), ("txt", b"original"))
    ]
    write_tar(tmp_path / "data" / "00000.tar", members)
    store = Store()
    manifests = ensure_indexed(store.expand(str(tmp_path / "data")), store)
    filters = [Captioner(str(model), column=c, prompt=p, tokens=2, batch=64, dtype="float32", device="cpu")
               for c, p in (("middle", "a photo of"), ("fused", "two blue squares"))]  # fmt: skip
    curate(manifests, filters, store)
    mix = {"caption": 0.5, "middle": 0.25, "fused": 0.25}  # SVD's, arXiv 2311.15127
    data = TarData(
        {"x": {"shards": str(tmp_path / "data"), "caption": mix}}, workers=0, cache_folder=str(tmp_path / "cache")
    )
    split = data.open(Square(8))
    batches = split.loader(split.plan(lanes=1, slice_size=rows, seed=0), range(1)).step(0)
    drawn = Counter(caption.split()[0] for batch in batches for caption in batch.captions)
    assert drawn.total() == rows
    for first_word, share in (("original", 0.5), ("a", 0.25), ("two", 0.25)):
        assert abs(drawn[first_word] / rows - share) < 4 * np.sqrt(share * (1 - share) / rows), drawn


def _shade(i: int) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), i % 256, np.uint8)).save(file, "PNG")
    return file.getvalue()
