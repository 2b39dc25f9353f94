"""A recipe being run: where its artifacts are, which of them have to be made, and who works in its folder."""

import errno
import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, is_deepspeed_available, parse_flag_from_env
from filelock import FileLock, Timeout

from lce_trainer.artifacts import (
    MANIFEST,
    Manifest,
    content_digest,
    load_table,
    read_manifest,
    save_artifact,
    why_stale,
)
from lce_trainer.errors import ArtifactError, ConfigError, FirstProcessError
from lce_trainer.hardware import best_device
from lce_trainer.pipeline.config import Recipe, load_recipe
from lce_trainer.synthesis.cost import QuoteReadyError
from lce_trainer.synthesis.journal import Journal
from lce_trainer.synthesis.llm.endpoint import EndpointLLM
from lce_trainer.synthesis.llm.loading import load_llm
from lce_trainer.synthesis.llm.protocol import LLM
from lce_trainer.synthesis.llm.ranks import RankedLLM, Ranks, dismiss, follow
from lce_trainer.synthesis.prompts import Prompt, load_prompt
from lce_trainer.synthesis.retrieval.bm25 import BM25Index
from lce_trainer.synthesis.retrieval.clusters import Clusters
from lce_trainer.synthesis.retrieval.dense import DenseIndex, Encoder
from lce_trainer.synthesis.retrieval.hybrid import FirstStage
from lce_trainer.training.arguments import LCETrainingArguments

logger = logging.getLogger(__name__)

Tables = Mapping[str, datasets.Dataset]
Made = tuple[Tables, Mapping[str, int], Mapping[str, Any]]  # tables, counts, facts

_MADE_BY = {
    "passages": "generate",
    "queries": "generate",
    "candidates": "mine",
    "groups": "label",
    "general": "evaluate",
    "evaluation": "evaluate",
}
_LOCK, _HOLDER = ".lock", ".lock.json"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP}  # of some network file systems


@dataclass
class Run:
    """A recipe and where it writes.

    Attributes:
        recipe: The settings.
        base: Folder of the recipe's file; paths in it may be relative to that.
    """

    recipe: Recipe
    base: Path
    _ranks: Ranks | None = field(default=None, init=False, repr=False)
    _leads: bool = field(default=False, init=False, repr=False)

    @cached_property
    def root(self) -> Path:
        """Folder that every stage writes under."""
        return Path(self.recipe.run_dir)

    @cached_property
    def llm(self) -> LLM:
        """The language model, loaded at its first question and shared by the stages.

        One that runs here is in each of several processes; the first makes all calls, and the others answer a share.
        """
        llm = load_llm(self.recipe.llm)
        # Behind servers, what one process sends keeps all of them busy.
        share = self._leads and self.recipe.llm.endpoint is None
        return RankedLLM(llm, self._ranks) if share and self._ranks is not None else llm

    def release_llm(self) -> None:
        """Let go of the language model, whose memory training needs."""
        self.__dict__.pop("llm", None)

    @cached_property
    def encoder(self) -> Encoder | None:
        """The encoder of dense retrieval, loaded at its first use; None where BM25 is alone."""
        mine = self.recipe.mine
        return Encoder(mine.encoder) if mine.encoder is not None and "dense" in mine.retrievers else None

    @property
    def searches_clusters(self) -> bool:
        """Whether dense retrieval looks through clusters of passages, as there are too many to compare all."""
        if self.encoder is None or not (self.root / "passages" / MANIFEST).is_file() or not Clusters.are_available():
            return False
        passages: int = self.manifest("passages").counts["passages"]
        return passages > self.recipe.mine.exact_up_to

    @cached_property
    def first_stage(self) -> FirstStage:
        """What brings candidates from the passages."""
        folder = self.root / "passages"
        bm25 = BM25Index.load(folder / "bm25") if "bm25" in self.recipe.mine.retrievers else None
        dense = DenseIndex.load(folder / "dense", self.encoder) if self.encoder is not None else None
        if dense is not None and self.searches_clusters:
            dense.clusters = Clusters.load(folder / "clusters")
        return FirstStage(self.manifest("passages").counts["passages"], bm25, dense)

    def table(self, name: str, split: str = "train") -> datasets.Dataset:
        """The rows of a finished artifact.

        Raises:
            ArtifactError: As :meth:`manifest`.
        """
        self.manifest(name)
        return load_table(self.root / name, name, split)

    def manifest(self, name: str) -> Manifest:
        """What made a finished artifact.

        Raises:
            ArtifactError: It is missing, unfinished or damaged; names the stage that makes it.
        """
        folder = self.root / name
        stage = _MADE_BY.get(name, "train")
        if not (folder / MANIFEST).is_file():
            what = "is unfinished" if folder.is_dir() else "does not exist"
            raise ArtifactError(f"{folder} {what}: run lce-trainer {stage} with this recipe first")
        try:
            return read_manifest(folder, name)
        except ArtifactError as error:
            raise ArtifactError(f"{error} (lce-trainer {stage})") from None

    def check_parent(self, name: str, parent: str) -> None:
        """Check that an artifact was made from the one that is there now.

        Raises:
            ArtifactError: It was made from another one.
        """
        if self.manifest(name).inputs.get(parent) != self.manifest(parent).digest:
            raise ArtifactError(
                f"{self.root / name} was made from other {parent} than those in {self.root / parent}: "
                "run lce-trainer run with this recipe again"
            )

    def prompt(self, name: str) -> Prompt:
        """A prompt of the package by name, or a file of the recipe's."""
        return load_prompt(name, self.base)

    def find(self, path: str) -> Path:
        """A path as written, or relative to the recipe's folder."""
        return Path(path) if Path(path).exists() else self.base / path

    def contents(self, paths: Iterable[str | None]) -> dict[str, str]:
        """Digest of each file or folder that the recipe names, so that an edited one counts as changed."""
        return {path: content_digest(self.find(path)) for path in paths if path and self.find(path).exists()}

    @contextmanager
    def held(self, wait: bool = True) -> Iterator[None]:
        """Hold the run folder, in which one command works at a time; the ranks of one command hold it together.

        A folder that this process may not write into is not held: nothing can be changed in it.

        Args:
            wait: Wait until another command is done; otherwise that is an error.

        Raises:
            ArtifactError: Another command holds the folder, and ``wait`` is False.
        """
        if self.root.is_dir() and not os.access(self.root, os.W_OK):
            yield
            return
        self.root.mkdir(parents=True, exist_ok=True)
        lock, complaint = FileLock(self.root / _LOCK), None
        try:
            if processes().is_main_process:
                complaint = _hold(lock, self.root, wait)
            complaint = broadcast_object_list([complaint])[0]  # the other ranks go on when the first one may
            if complaint is not None:
                raise ArtifactError(complaint)
            yield
        finally:
            if lock.is_locked:
                with suppress(OSError):
                    (self.root / _HOLDER).unlink(missing_ok=True)
                lock.release()

    def lead(self, work: Callable[[], None]) -> None:
        """Do some work in the first of several processes, while the others answer a share of its LLM's calls.

        Args:
            work: What is done; it may lead again.

        Raises:
            QuoteReadyError: In all processes, where the first one's work raises it.
            FirstProcessError: In the other processes, where the first one's work raises something else.
        """
        if self._leads or processes().num_processes == 1:
            work()
            return
        self._ranks = ranks = self._ranks or Ranks()
        if not processes().is_main_process:
            ended = follow(ranks, lambda: self.llm)
            if ended is not None:
                kind = QuoteReadyError if ended["quote"] else FirstProcessError
                raise kind(ended["message"])
            return
        self._leads = True
        try:
            work()
        except Exception as error:
            dismiss(ranks, {"message": str(error), "quote": isinstance(error, QuoteReadyError)})
            raise
        finally:
            self._leads = False
        dismiss(ranks, None)

    def make(
        self,
        name: str,
        config: Mapping[str, Any],
        inputs: Sequence[str],
        work: Callable[[], Made],
        parts: Sequence[str] = (),
    ) -> None:
        """Make an artifact, unless it is there and whole, made from the same things.

        Of several processes one works, see :meth:`lead`.

        Args:
            name: Of the artifact: its folder and its kind.
            config: The settings that shape it.
            inputs: Names of the artifacts it is made from.
            work: Makes it.
            parts: Folders in the artifact's that ``work`` writes, with manifests of their own.
        """

        def make() -> None:
            shape = {**config, "seed": self.recipe.seed}
            digests = {kind: self.manifest(kind).digest for kind in inputs}
            if not is_stale(self.root / name, name, shape, digests, parts):
                return
            if self.root.is_dir() and not os.access(self.root, os.W_OK):
                raise ArtifactError(f"{self.root / name} has to be made, and {self.root} may not be written to")
            tables, counts, facts = work()
            if not all(map(len, tables.values())):
                raise ArtifactError(f"nothing is left for {name}: {counts}; loosen what drops rows in the recipe")
            save_artifact(self.root / name, tables, kind=name, config=shape, inputs=digests, counts=counts, facts=facts)
            counted = (f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items() if count)
            logger.info("%s: %s", name, ", ".join(counted))

        self.lead(make)
        if not (self.root / name / MANIFEST).is_file():
            raise ArtifactError(
                f"the first process has made {self.root / name}, and this one does not find it: "
                "run_dir must be on a file system that all processes share"
            )


def _hold(lock: FileLock, root: Path, wait: bool) -> str | None:
    """Acquire the lock of a run folder; returns who holds it if that is another command, and it is not waited for."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        busy = f"{root} is in use by {_holder(root)}"
        if not wait:
            return f"{busy}: wait until it is done, or stop it"
        logger.warning("%s: waiting until it is done", busy)
        lock.acquire(poll_interval=0.2)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): do not start a second command in it", root, error.strerror)
        return None
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    with suppress(OSError):  # a full disk: the lock holds, and only its holder's name is missing
        (root / _HOLDER).write_text(json.dumps(me) + "\n", encoding="utf-8")
    return None


def _holder(root: Path) -> str:
    """Who holds a run folder."""
    try:
        return "process {pid} on {host} since {since}".format_map(json.loads((root / _HOLDER).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def processes() -> PartialState:
    """The processes of this command, one unless ``accelerate launch`` started more."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not is_deepspeed_available():
        raise ConfigError("accelerate was launched with DeepSpeed, which is not installed: pip install deepspeed")
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or best_device().type == "cpu"
    # One process may work on a stage for hours; by default those that wait give up after ten minutes.
    return PartialState(cpu=on_cpu, timeout=timedelta(hours=24))


def is_stale(
    folder: Path, name: str, config: Mapping[str, Any], inputs: Mapping[str, str], parts: Sequence[str] = ()
) -> bool:
    """Whether a stage has work to do; logs why. The arguments are those of ``artifacts.why_stale``."""
    stale = why_stale(folder, name, config, inputs, parts)
    if stale is None:
        logger.info("%s: already made, in %s", name, folder)
    elif (folder / "manifest.json").exists():
        logger.info("%s: made again: %s", name, stale)
    return stale is not None


def open_journal(path: Path, llm: LLM | None) -> Journal:
    """Open the journal of a stage.

    Args:
        path: The file.
        llm: Whose answers it keeps; None where another model gives them.

    Raises:
        ArtifactError: As :class:`lce_trainer.synthesis.journal.Journal`.
    """
    journal = Journal(path)
    journal.answers_alone = isinstance(llm, EndpointLLM)
    journal.at_once = llm.at_once if isinstance(llm, RankedLLM) else 1
    return journal


def open_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Read a recipe for running.

    Raises:
        ConfigError: As :func:`lce_trainer.pipeline.config.load_recipe`.
    """
    training_keys = [item.name for item in fields(LCETrainingArguments) if item.init]
    return Run(load_recipe(path, overrides, training_keys), path.parent)
