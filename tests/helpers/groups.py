"""What groups say, without their ids."""

from datasets import Dataset


def content(groups: Dataset) -> dict[str, tuple[list[str], list[str]]]:
    """Positives and negatives of each query, in their order."""
    return {
        row["query"]: (
            [text for text, label in zip(row["passages"], row["labels"], strict=True) if label > 0],
            [text for text, label in zip(row["passages"], row["labels"], strict=True) if label <= 0],
        )
        for row in groups
    }
