"""Score pairs window by window, so that memory holds no more than one of them, in one process or several."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lce_trainer.distributed import passes_are_collective, until_all_ranks_end
from lce_trainer.errors import TrainingError
from lce_trainer.model.pairs import EncodedPairs, encode_by_template, pair_layout, tokenize_texts
from lce_trainer.model.template import as_text, pair_template

WINDOW = 16384  # pairs in memory at once, of all ranks together: bounds what texts and token ids take

Pair = tuple[str, str]


def tokens_at_once(wanted: int | None, device: torch.device) -> int:
    """Tokens of a forward pass: those wanted, or as many as are fast: a CPU's caches hold few, a GPU idles with few."""
    usual = 4096 if device.type == "cpu" else 65536
    return usual if wanted is None else wanted


def score_pairs(
    score: Callable[[EncodedPairs], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Pair],
    max_length: int,
    batch_tokens: int,
    accelerator: Accelerator | None = None,
    **bar_settings: Any,
) -> np.ndarray:
    """Score every pair once, on some rank.

    Args:
        score: Gives the logit of each pair of a batch, shape ``(pairs,)``.
        tokenizer: Of the model.
        pairs: Query and passage of each, the same on every rank; read once, a window at a time.
        max_length: Tokens of a pair at most.
        batch_tokens: As :func:`scoring_batches` takes it.
        accelerator: Of the ranks that share the pairs, every one of which must call; None keeps to this process.
        **bar_settings: For the progress bar.

    Returns:
        Raw logits, float32, shape ``(pairs,)``, the same on every rank.

    Raises:
        TrainingError: Something is not a pair of strings, ``batch_tokens`` is no positive number, or the ranks
            were given different pairs.
    """
    if batch_tokens < 1:
        raise TrainingError(f"batch_tokens={batch_tokens}: a batch has 1 token at least, and better some thousands")
    found = [np.zeros(0, dtype=np.float32)]
    total = len(pairs) if isinstance(pairs, Sized) else None
    done = 0
    with tqdm(total=total, unit="pair", **bar_settings) as bar:
        for window in _windows(pairs, accelerator):
            # Equal pairs are scored once: rows of one batch can differ in the last bit.
            places = {pair: place for place, pair in enumerate(dict.fromkeys(window))}
            scores = _score_window(score, tokenizer, list(places), max_length, batch_tokens, accelerator, bar.update)
            found.append(scores[[places[pair] for pair in window]])
            done += len(window)
            bar.update(done - bar.n)
    return np.concatenate(found)


def _windows(pairs: Iterable[Pair], accelerator: Accelerator | None) -> Iterator[list[Pair]]:
    """Yield checked pairs, a window at a time."""
    numbered = enumerate(pairs)
    while True:
        window = [_checked(number, pair) for number, pair in islice(numbered, WINDOW)]
        if accelerator is not None and accelerator.num_processes > 1:
            _check_the_others(accelerator, window)
        if not window:
            return
        yield window


def _checked(number: int, pair: Any) -> Pair:
    if not isinstance(pair, str) and isinstance(pair, Sequence) and len(pair) == 2:
        query, passage = pair
        if isinstance(query, str) and isinstance(passage, str):
            return query, passage
    raise TrainingError(
        f"pair {number} (the first is 0) is {repr(pair)[:80]}: a pair is a query and a passage, two strings"
    )


def _check_the_others(accelerator: Accelerator, window: list[Pair]) -> None:
    """Ranks with other pairs would add up scores of different things, or wait for each other forever."""
    digest = zlib.crc32("\0".join(text for pair in window for text in pair).encode("utf-8", "surrogatepass"))
    mine = torch.tensor([[len(window), digest]], device=accelerator.device)
    everyones: Tensor = accelerator.gather(mine)
    if (everyones != mine).any():
        raise TrainingError(
            "the processes were given different pairs: give each of them all pairs, in the same order, and they "
            "share them; or leave accelerator out, and each scores its own"
        )


def _score_window(
    score: Callable[[EncodedPairs], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    max_length: int,
    batch_tokens: int,
    accelerator: Accelerator | None,
    advance: Callable[[int], Any],
) -> np.ndarray:
    """Scores of distinct pairs, shape ``(pairs,)``, the same on every rank."""
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    mine = np.arange(rank, len(pairs), ranks)
    scores = torch.zeros(len(pairs), device=accelerator.device if accelerator is not None else "cpu")
    batches: Iterator[Any] = scoring_batches(tokenizer, [pairs[i] for i in mine], max_length, batch_tokens)
    together = accelerator is not None and passes_are_collective(accelerator)
    if accelerator is not None and together:
        batches = until_all_ranks_end(accelerator, batches)
    # What FSDP gathers in inference mode it could not train with.
    with torch.no_grad() if together else torch.inference_mode():
        for batch in batches:
            if batch is None:
                score(next(scoring_batches(tokenizer, pairs[:1], max_length, batch_tokens))[1])
                continue
            rows, encoded = batch
            scores[torch.as_tensor(mine[rows], device=scores.device)] = score(encoded).float().to(scores.device)
            advance(ranks * len(rows))
    # Every other rank holds zero for a pair, so the sum is exact.
    if accelerator is not None and ranks > 1:
        scores = accelerator.reduce(scores, reduction="sum")
    return scores.cpu().numpy()


def scoring_batches(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int, batch_tokens: int
) -> Iterator[tuple[np.ndarray, EncodedPairs]]:
    """Batches of pairs alike in length, the longest first.

    Pairs are cut as every other loader of the checkpoint cuts them, from the longer side first: a
    query is whole as long as it takes less than half of the room, and is encoded as in training.

    Args:
        tokenizer: Of the model.
        pairs: Query and passage of each; all are tokenized at once.
        max_length: Tokens of a pair at most.
        batch_tokens: Tokens of a batch at most, were it padded; a single pair may have more.

    Yields:
        Indices of the batch's pairs, and their token ids.

    Raises:
        TrainingError: ``max_length`` leaves no room for the texts.
    """
    if not len(pairs):
        return
    lengths, encoded = _encoder(tokenizer, pairs, max_length)
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        rows, order = np.split(order, [max(1, batch_tokens // lengths[order[0]])])
        yield rows, encoded(rows)


def _encoder(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int
) -> tuple[np.ndarray, Callable[[np.ndarray], EncodedPairs]]:
    """Tokens of each pair, shape ``(pairs,)``, and what encodes those of some rows; each text is tokenized once."""
    if template := pair_template(tokenizer):
        encoded = encode_by_template(tokenizer, template, pairs, max_length)[0]
        return encoded.lengths, encoded.take
    if not tokenizer.is_fast:
        queries, passages = (as_text(tokenizer, texts) for texts in zip(*pairs, strict=True))
        encoded = EncodedPairs.of(tokenizer(queries, passages, truncation="longest_first", max_length=max_length))
        return encoded.lengths, encoded.take
    places = {text: place for place, text in enumerate(dict.fromkeys(chain.from_iterable(pairs)))}
    rows = np.fromiter(map(places.__getitem__, chain.from_iterable(pairs)), np.int64, 2 * len(pairs)).reshape(-1, 2)
    layout = pair_layout(tokenizer)
    if max_length <= layout.overhead:
        raise TrainingError(f"max_length is {max_length}, but a pair has {layout.overhead} special tokens: raise it")
    found = tokenize_texts(tokenizer, list(places))
    kept = longest_first(found.counts[rows], max_length - layout.overhead)
    texts = layout.with_separators([found])
    return kept.sum(axis=1) + layout.overhead, lambda some: layout.join(
        texts, rows[some], kept[some], tokenizer.truncation_side
    )


def longest_first(counts: np.ndarray, room: int) -> np.ndarray:
    """Return how many tokens ``truncation="longest_first"`` keeps of each query and passage.

    The shorter text of a pair that is too long keeps at most half of the room, and the longer one gets the rest;
    of two equally long ones the query counts as the shorter.

    Args:
        counts: Tokens of each query and passage, shape ``(pairs, 2)``.
        room: Tokens that a pair's two texts may have together.

    Returns:
        Tokens that are kept of them, shape ``(pairs, 2)``.
    """
    short = np.minimum(counts.min(axis=1), room // 2)
    query_is_short = counts[:, 0] <= counts[:, 1]
    query = np.where(query_is_short, short, room - short)
    return np.where(counts.sum(axis=1, keepdims=True) > room, np.stack([query, room - query], axis=1), counts)
