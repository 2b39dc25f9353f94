"""Groups and settings that several processes tokenize alike."""

from lce_trainer.training.arguments import LCETrainingArguments


def settings(folder, **chosen) -> LCETrainingArguments:
    chosen = {"max_length": 32, "max_query_length": 8, "group_size": 3, "report_to": "none", **chosen}
    return LCETrainingArguments(str(folder), **chosen)


TRIPLETS = {"anchor": ["what", "why"], "positive": ["moon", "tree"], "negative": ["snow", "stone river"]}
