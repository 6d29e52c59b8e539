"""Training data: conversation files, images, samples, batches and their order."""

from .dataset import Collator, ConversationDataset
from .images import ImageFolder
from .records import DataError, Problem, Record, Records, read_records
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
