"""Which passages of a group are trained on in which epoch: pure functions of the seed.

Nothing here has a state that workers, ranks or a resumed run could lose. The epoch travels
with the row's index from the sampler, in the main process, to wherever the row is collated.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lce_trainer.errors import GroupsError
from lce_trainer.training.arguments import LCETrainingArguments

if TYPE_CHECKING:  # the collator is for whoever has torch and transformers alone
    import datasets

    from lce_trainer.training.token_ids import TokenIds

Item = tuple[int, int] | None  # (epoch, row), or None: a place that pads the last batch of an epoch


def sample_group(
    seed: int,
    epoch: int,
    query_id: str,
    labels: Sequence[float],
    n_negatives: int,
    curriculum_epochs: int | None = None,
) -> tuple[int, list[int]]:
    """Draw the positive of a query and the negatives it competes with in one epoch.

    Positives take turns by epoch. The competitors of a positive are the passages with a strictly
    lower label; they are walked through in an order drawn for the query, and none comes again
    before each has come once. Then a new order is drawn.

    With a curriculum, epoch e of E draws from the easiest (e + 1) / E of the competitors, which
    are expected to stand with the hardest first, as retrievers and judges leave them; from epoch
    E - 1 on from all. Those drawn least often so far come first, so what an epoch adds is what is
    trained on. Source: easy before hard helped rerankers in MacAvaney et al. 2020,
    https://huggingface.co/papers/2004.14269, by weights; growing the pool is chosen by us.

    Args:
        seed: Of the run.
        epoch: From 0.
        query_id: Names the query; two queries with the same id draw alike.
        labels: Grade of each passage, above 0 for positives.
        n_negatives: Wanted; a group with fewer competitors gives all of them, none twice.
        curriculum_epochs: E above; no curriculum if None or 1.

    Returns:
        Index of the positive, and indices of the negatives, among the labels.

    Raises:
        GroupsError: No label is above 0 and above another label.
    """
    grades = np.asarray(labels, dtype=np.float64)
    positives = np.flatnonzero((grades > 0) & (grades > grades.min(initial=np.inf)))
    if not len(positives):
        raise GroupsError(f"query {query_id!r} needs a positive label and a lower one, not {list(labels)}")
    turns = positives[_permutation(len(positives), seed, query_id, "positives")]
    turn = epoch % len(turns)
    target = turns[turn]
    grade = grades[target]
    pool = np.flatnonzero(grades < grade)
    if n_negatives >= len(pool):
        return int(target), pool.tolist()
    if curriculum_epochs is not None and curriculum_epochs > 1:
        visits = [at for at in range(epoch + 1) if grades[turns[at % len(turns)]] == grade]
        return int(target), _easy_to_hard(pool, n_negatives, visits, curriculum_epochs, (seed, query_id, grade))
    # Positives of one grade share a pool: count how often it has been drawn from before.
    same = grades[turns] == grade
    visit = int(epoch // len(turns) * same.sum() + same[:turn].sum())
    visits_in_a_pass = -(-len(pool) // n_negatives)
    order = pool[_permutation(len(pool), seed, query_id, grade, visit // visits_in_a_pass)]
    start = visit % visits_in_a_pass * n_negatives
    # The last visit of a pass is filled up from the pass's own start.
    return int(target), order[np.arange(start, start + n_negatives) % len(pool)].tolist()


def _easy_to_hard(
    pool: np.ndarray, n_negatives: int, visits: Sequence[int], curriculum_epochs: int, key: tuple[Any, ...]
) -> list[int]:
    """The last visit's draw; replays the earlier ones (epochs, ascending) to know what has been drawn how often."""
    times = np.zeros(len(pool), dtype=int)
    drawn: list[int] = []
    for epoch in visits:
        easiest = -(-len(pool) * (epoch + 1) // curriculum_epochs)
        first = len(pool) - min(max(easiest, n_negatives), len(pool))
        shuffled = first + _permutation(len(pool) - first, *key, "curriculum", epoch)
        drawn = shuffled[np.argsort(times[shuffled], kind="stable")[:n_negatives]].tolist()
        times[drawn] += 1
    return [int(pool[i]) for i in drawn]


def _permutation(n: int, *key: Any) -> np.ndarray:
    if n < 2:
        return np.arange(n)
    return np.argsort(random_raw(n, *key), kind="stable")


def random_raw(n: int, *key: Any) -> np.ndarray:
    """Return random numbers that are a function of a key, uint64, shape ``(n,)``."""
    # Raw Philox output is the same in every numpy; Generator.permutation is not promised to be.
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    found: np.ndarray = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(n)
    return found


class GroupSampler(Sampler[Item]):
    """Every row once an epoch, in an order drawn from the seed and the epoch.

    The last batch of an epoch is filled up with ``None`` and not with rows drawn twice, so that a
    step holds the same groups however it is cut into batches and ranks.
    """

    def __init__(
        self,
        rows: int,
        *,
        seed: int,
        epoch: Callable[[], int],
        multiple: int = 1,
        copies: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        """Describe the order.

        Args:
            rows: In the dataset.
            seed: Of the order.
            epoch: Returns the epoch when one starts. Not an attribute that others set: ``accelerate`` does
                not reach the sampler when several ranks resume in the middle of an epoch.
            multiple: Places are filled up to a multiple of this: groups a batch times ranks.
            copies: Each run of that many places comes so many times in a row, because ranks that share every group
                need equal batches.
            shuffle: False keeps the order of the dataset.
            drop_last: Drop the last rows instead of filling up.
        """
        self.rows = rows
        self.seed = seed
        self.epoch = epoch
        self.shuffle = shuffle
        self.multiple = multiple
        self.copies = copies
        self.places = (rows if drop_last else rows + multiple - 1) // multiple * multiple

    def __iter__(self) -> Iterator[Item]:
        epoch = self.epoch()
        order = _permutation(self.rows, self.seed, "epoch", epoch) if self.shuffle else np.arange(self.rows)
        rows: Iterator[Item] = ((epoch, int(row)) for row in order[: self.places])
        places = chain(rows, repeat(None, max(self.places - self.rows, 0)))
        while batch := list(islice(places, self.multiple)):
            yield from batch * self.copies

    def __len__(self) -> int:
        return self.places * self.copies


def group_sampler(rows: int, batch_size: int, args: LCETrainingArguments, epoch: Callable[[], int]) -> GroupSampler:
    """Make the sampler of a run; ``batch_size`` counts the groups of a batch on one rank."""
    return GroupSampler(
        rows,
        seed=args.seed if args.data_seed is None else args.data_seed,
        epoch=epoch,
        multiple=batch_size * (1 if args.split_groups else args.world_size),
        copies=args.world_size if args.split_groups else 1,
        shuffle=args.train_sampling_strategy == "random",
        drop_last=args.dataloader_drop_last,
    )


class EpochCounter(TrainerCallback):  # type: ignore[misc]
    """Counts which epoch a run is in.

    The state's own is right when an epoch starts, in fresh, resumed and many-rank runs alike, but for one: after an
    epoch that a callback ended early it would give that epoch's order once more.
    """

    def __init__(self) -> None:
        self.now = 0
        self._begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier run."""
        self.__init__()  # type: ignore[misc]

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count one more epoch than the last, and as many as a resumed run had begun."""
        self.now = max(int(state.epoch or 0), self.now + self._begun)
        self._begun = True


class EpochGroups(Dataset[dict[str, Any] | None]):
    """Rows of groups that know the epoch they are drawn in."""

    def __init__(self, groups: "datasets.Dataset", token_ids: "TokenIds | None" = None) -> None:
        """Keep groups and, in place of their texts, token ids if there are some."""
        self.groups = groups if token_ids is None else groups.select_columns(["query_id", "labels", "scores"])
        self.token_ids = token_ids

    def __len__(self) -> int:
        return len(self.groups)

    def __getitems__(self, items: Sequence[Item]) -> list[dict[str, Any] | None]:
        """Return the rows of a batch, each with its ``epoch``; None where the batch is only filled up."""
        wanted = [item[1] for item in items if item is not None]
        found = self.groups.__getitems__(wanted) if wanted else []
        if self.token_ids is not None and wanted:
            ids = self.token_ids.take(wanted)
            found = [{**row, "query": query, "passages": texts} for row, (query, texts) in zip(found, ids, strict=True)]
        rows = iter(found)
        return [None if item is None else {**next(rows), "epoch": item[0]} for item in items]

    def __getitem__(self, item: Item) -> dict[str, Any] | None:
        return self.__getitems__([item])[0]
