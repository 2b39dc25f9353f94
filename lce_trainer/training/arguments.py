"""The settings of a training run: transformers' own, and the trainer's."""

import json
import logging
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_available
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from lce_trainer.errors import ConfigError
from lce_trainer.hardware import best_device

DEFAULT_METRIC = "ndcg@10"  # that chooses the best checkpoint, and that early stopping goes by

_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedulers that follow an evaluation's figure


@dataclass
class LCETrainingArguments(TrainingArguments):  # type: ignore[misc]
    """``transformers.TrainingArguments``, with what a reranker's training needs besides.

    Batch sizes count groups, so a batch has ``per_device_train_batch_size * group_size`` pairs at
    most on each device. The Hub token is never part of what is saved or pickled.

    Raises:
        ConfigError: A value cannot be used; transformers' own complaints come as this too.
    """

    # --- Groups and what is drawn of them ---
    group_size: int = field(
        default=8, metadata={"help": "Passages of a query in one step: one positive, the rest negatives."}
    )
    curriculum_epochs: int | None = field(
        default=None,
        metadata={
            "help": "Epochs in which the negatives go from the easiest to all: epoch e of them draws from the easiest "
            "(e + 1) / curriculum_epochs of each group's, which must stand with the hardest first. null: from all."
        },
    )
    stuffed_negatives: float = field(
        default=0.0,
        metadata={
            "help": "Share of the negatives, from 0 to 1, to which the query or its words are added, drawn anew in "
            "each epoch: the model then learns that repeating a query answers none. Labels and scores stay those of "
            "the passage; `lce-trainer attack` measures what it gains. 0: none."
        },
    )
    max_length: int = field(
        default=256, metadata={"help": "Tokens of a query and passage together at most; the passage is cut."}
    )
    max_query_length: int = field(
        default=64, metadata={"help": "Tokens of a query at most while training; shorter ones are kept whole."}
    )
    special_tokens_in_texts: bool = field(
        default=False,
        metadata={
            "help": "With false, [SEP], <pad> and the like are text where they stand in a query or passage, in "
            "training and after, so that no author of a passage can use them. With true they keep their meaning, for "
            "passages such as `title [SEP] text`."
        },
    )
    # --- Model ---
    yes_no: bool | None = field(
        default=None,
        metadata={
            "help": "Score by what a language model answers, logit(yes) - logit(no), in place of a new head. "
            "null: where the checkpoint is one that does."
        },
    )
    # --- Loss ---
    temperature: float = field(default=1.0, metadata={"help": "Divides the scores in the loss."})
    distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "Part, from 0 to 1, of the loss of a group with `scores` that is the KL divergence from "
            "their softmax; the rest of it is LCE. Groups without scores learn from their labels alone."
        },
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "Divides the groups' `scores` before their softmax."}
    )
    # --- Memory and speed; none of these changes what is learned ---
    micro_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs that go through the model and back at once: saves memory, and the gradient stays that of "
            "the whole batch. A group with more pairs goes through twice, by a score gradient cache. null: the "
            "whole batch."
        },
    )
    micro_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that go through the model and back at once, cut as by micro_batch_size, which may bound it "
            "too: the steadier measure of memory where lengths differ. null: the whole batch."
        },
    )
    packing: str = field(
        default="auto",
        metadata={
            "help": "With auto the pairs of a batch run in one row without padding, where the model's family can, and "
            "the last layer computes only what its head reads; exact. With none they are padded."
        },
    )
    pretokenize: bool | None = field(
        default=None,
        metadata={
            "help": "Tokenize all groups once, before the first step, into the cache of datasets, which later runs "
            "reuse: a batch is then put together from memory-mapped ids. null: on an accelerator. Not for streams, "
            "nor where pairs go through a template or negatives are stuffed."
        },
    )
    split_groups: bool = field(
        default=False,
        metadata={
            "help": "Devices share the pairs of every group, for groups too large for one: each runs its part, all "
            "learn every score. per_device_train_batch_size then counts the groups of all devices together."
        },
    )
    bucket_overhead: int | None = field(
        default=None,
        metadata={
            "help": "Where pairs are padded: tokens of padding worth one more forward pass. Larger cuts "
            "less, 0 never pads. null: 256 on CPU, 16384 on an accelerator."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={"help": "Round padded lengths up to a multiple of this; 8 suits half precision on GPUs."},
    )
    eval_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens, padding included, scored in one forward pass of an evaluation. null: 4096 on CPU, 65536 "
            "on an accelerator."
        },
    )

    # --- Defaults other than transformers' own ---
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Linear warmup: a number of steps, or below 1 a part of all steps."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay; biases and norms have none."})
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two lines of the log, or below 1 a part of all steps."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run stops early when the uninterrupted one would have."}
    )
    # --- What must stay as it is ---
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: the model reads tensors, never the dataset's columns."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Not used: a loss that is NaN or Inf stops the run in its step."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "True only for a model that leaves some of its parameters unused."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={"help": "Must be false: ranks may run a different number of forward passes in one step."},
    )

    def __post_init__(self) -> None:
        self._chosen = {item.name for item in fields(self) if getattr(self, item.name, None) not in (item.default, [])}
        if best_device().type == "cpu":
            # Otherwise transformers refuses bf16 on a machine that has no GPU but may well multiply it.
            self.use_cpu = True
        if getattr(self, "metric_for_best_model", None) is None and (
            self.load_best_model_at_end or self.lr_scheduler_type in _BY_METRIC or self.save_strategy == "best"
        ):
            self.metric_for_best_model = DEFAULT_METRIC
        for item in fields(self):
            value = getattr(self, item.name, None)
            # YAML reads an unquoted no as False, and 2e-5 as a string.
            if value is False and item.name.endswith("_strategy"):
                setattr(self, item.name, "no")
            if isinstance(value, str) and isinstance(item.default, float):
                try:
                    setattr(self, item.name, float(value))
                except ValueError:
                    raise ConfigError(f"{item.name} must be a number, not {value!r}") from None
        self._check_numbers()
        if self.deepspeed and not is_deepspeed_available():
            raise ConfigError("deepspeed is set, but DeepSpeed is not installed: pip install deepspeed")
        try:
            super().__post_init__()
        except (ValueError, ImportError, OSError) as error:  # the last: DeepSpeed's file is missing
            raise ConfigError(" ".join(str(error).split())) from None
        if self.lr_scheduler_type in _BY_METRIC:
            # Both treat a lower metric as a better one by default, and transformers leaves it at that.
            defaults: dict[str, Any] = {"mode": "max" if self.greater_is_better else "min"}
            if self.lr_scheduler_type == "greedy":
                defaults["min_lr"] = 0.0  # its own floor, 1e-3, lies above what rerankers train with
            self.lr_scheduler_kwargs = defaults | (getattr(self, "lr_scheduler_kwargs", None) or {})
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False  # of a stream: our batches are no plain tensors
        self._check()

    def _check_numbers(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name, None)
            if isinstance(value, float) and math.isnan(value):
                raise ConfigError(f"{item.name} must be a number, not nan")
        for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be 0 or more, not {value}")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and 0 <= value < 2**32):
                raise ConfigError(f"{name} must be a whole number from 0 to {2**32 - 1}, not {value!r}")

    def _check(self) -> None:
        known = sorted(INTEGRATION_TO_CALLBACK)
        for name in self.report_to:
            if name not in known:
                raise ConfigError(f"report_to must be none, all or some of {', '.join(known)}, not {name!r}")
            if name not in {*get_available_reporting_integrations(), "flyte"}:  # flyte is never listed
                raise ConfigError(f"report_to is {name}, which is not installed: install it, or set report_to to none")
        least = {"group_size": 2, "max_length": 8, "max_query_length": 1, "micro_batch_size": 1, "eval_batch_tokens": 1}
        least |= {"micro_batch_tokens": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        least["curriculum_epochs"] = 1
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < bound):
                raise ConfigError(f"{name} must be a whole number from {bound} up, not {value!r}")
        for name in ("temperature", "distillation_temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 <= self.distillation_weight <= 1:
            raise ConfigError(f"distillation_weight must be from 0 to 1, not {self.distillation_weight}")
        if not 0 <= self.stuffed_negatives <= 1:
            raise ConfigError(f"stuffed_negatives must be from 0 to 1, not {self.stuffed_negatives}")
        if self.packing not in ("auto", "none"):
            raise ConfigError(f"packing must be auto or none, not {self.packing!r}")
        if self.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor must be 0: LCE does not use it; for a softer target distil from scores, see "
                "distillation_weight"
            )
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ConfigError(
                "save_strategy is best, but nothing is ever evaluated: set eval_strategy to steps or epoch"
            )
        if self.remove_unused_columns:
            raise ConfigError("remove_unused_columns must be false: the groups' columns are not the model's inputs")
        if self.ddp_broadcast_buffers:
            raise ConfigError("ddp_broadcast_buffers must be false: ranks may run a different number of forward passes")
        if self.accelerator_config.dispatch_batches or self.accelerator_config.split_batches:
            raise ConfigError(
                "accelerator_config: dispatch_batches and split_batches must be false: ranks make batches"
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ConfigError(
                f"train_sampling_strategy must be random or sequential, not {self.train_sampling_strategy!r}: "
                "pairs are put together by length inside each step, see bucket_overhead"
            )

    def to_public_dict(self) -> dict[str, Any]:
        """The settings that were chosen, without tokens and without where things lie on this machine."""
        hidden = {"output_dir", "logging_dir", "run_name", "resume_from_checkpoint"}
        return {
            name: value
            for name, value in sorted(self.to_dict().items())
            if name in self._chosen - hidden and not name.endswith("_token")
        }

    def save_public(self, folder: Path) -> None:
        """Write :meth:`to_public_dict` as ``training_args.json``, in place of the pickle that transformers leaves."""
        (folder / "training_args.bin").unlink(missing_ok=True)
        settings = json.dumps(self.to_public_dict(), indent=2, sort_keys=True, default=str)
        (folder / "training_args.json").write_text(settings + "\n", encoding="utf-8")

    def __getstate__(self) -> dict[str, Any]:
        # transformers pickles its arguments beside every checkpoint, and pushes them.
        return {name: None if name.endswith("_token") else value for name, value in self.__dict__.items()}


def configure_logging(args: LCETrainingArguments) -> None:
    """Print the trainer's log messages from ``log_level`` up, where nobody configured logging.

    With ``log_level="passive"`` those are all messages of the main process, and warnings of the others; unless
    transformers is configured to log less. Where logging is configured, before or after this, messages go there alone,
    and only a ``log_level`` that was chosen changes how many.

    Args:
        args: Of the run.
    """
    ours, level, passive = logging.getLogger("lce_trainer"), args.get_process_log_level(), args.log_level == "passive"
    configured = ours.hasHandlers()
    if passive and args.should_log and level == logging.WARNING:
        level = logging.INFO
    if not passive or not (configured or ours.level):
        ours.setLevel(level)
    if configured:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[lce_trainer] %(message)s"))
    handler.addFilter(lambda record: not logging.getLogger().handlers)  # configured since
    ours.addHandler(handler)
