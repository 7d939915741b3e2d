"""Captioned images from disk to uint8 arrays, by the same fixed, public steps at every site.

`dataset.py` opens a data set; one reader a layout (`folder.py`, `arrays.py`) says which records it holds;
`decoding.py` and `preprocessing.py` make an image file into a square of pixels; `cache.py` keeps the result.
Nothing here is fitted on the data (PRIVACY rule 17), and nothing prints a caption or a pixel.
"""

from shared.data.augmentation import augment
from shared.data.dataset import READERS, ImageCaptionDataset, open_dataset, unseen_split
from shared.data.preprocessing import pipeline_fingerprint
from shared.data.source import SUBJECT_ID, SkippedRow

__all__ = [
    "READERS", "SUBJECT_ID", "ImageCaptionDataset", "SkippedRow", "augment", "open_dataset", "pipeline_fingerprint",
    "unseen_split",
]  # fmt: skip
