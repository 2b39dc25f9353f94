"""Streamed groups."""

from datasets import IterableDataset

from helpers.trainers import make_groups

USELESS = [
    {"query_id": "all", "query": "red", "passages": ["a", "b"], "labels": [1.0, 1.0], "scores": None},
    {"query_id": "none", "query": "red", "passages": ["a", "b"], "labels": [0.0, 0.0], "scores": None},
    {"query_id": "empty", "query": "red", "passages": [], "labels": [], "scores": None},
]


def make_stream(n: int = 11, shards: int = 1) -> IterableDataset:
    """In the order of the dataset; of several shards, the datasets library shuffles them from the second pass on."""
    return make_groups(n).to_iterable_dataset(num_shards=shards)


RUN = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6}
