"""Training data: conversation files, images, samples, batches and their order."""

from .collate import Collator
from .dataset import ConversationDataset
from .images import ImageFolder
from .problems import DataError, Problem
from .records import Record, Records, read_records
from .sampler import ModalityLengthSampler

__all__ = [
    "Collator",
    "ConversationDataset",
    "DataError",
    "ImageFolder",
    "ModalityLengthSampler",
    "Problem",
    "Record",
    "Records",
    "read_records",
]
