"""The columns that the filters of conf/filter write, as these are set there."""

COLUMNS = {
    "aesthetic": ("clip_aesthetic",),
    "blank": ("contrast", "uniformity"),
    "captions": ("synthetic_caption",),
    "clip": ("clip_embedding", "clip_similarity"),
    "content_hash": ("content_hash",),
    "cuts": ("shots", "cuts", "clips"),
    "duplicates": ("duplicate_group", "duplicate_rank"),
    "motion": ("motion",),
    "nsfw": ("clip_nsfw",),
    "perceptual_hash": ("phash", "phash_windows", "phash_colors", "phash_window_colors"),
    "probe": (
        "codec",
        "pixel_format",
        "bit_rate",
        "counted_frames",
        "fps_spread",
        "key_frames",
        "key_interval",
        "rotation",
        "sound",
    ),
    "semantic_duplicates": ("semantic_cluster", "semantic_group", "semantic_rank"),
    "sharpness": ("sharpness",),
    "static": ("still", "pictures", "slideshow"),
    "text_area": ("text_area",),
    "watermark": ("clip_watermark",),
}
"""By filter."""

WRITTEN_BY = {column: name for name, columns in COLUMNS.items() for column in columns}
"""By column, the filter."""
