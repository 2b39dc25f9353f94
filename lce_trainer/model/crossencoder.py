"""The files that sentence-transformers keeps beside a model, and without which it would score otherwise.

It calls chat templates with settings and a default prompt from its own files, and a language model
that answers yes or no has its tokens in a ``LogitScore`` module.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lce_trainer.compat import find_file
from lce_trainer.errors import TrainingError
from lce_trainer.model.template import pair_template
from lce_trainer.names import failed

# sentence-transformers squashes the score of a one-label model unless its config says otherwise.
RAW_SCORES = {"activation_fn": "torch.nn.modules.linear.Identity"}
LOGIT_SCORE = "1_LogitScore"
_TYPES = (
    "sentence_transformers.base.modules.transformer.Transformer",
    "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
)
_NOT_RENDERED = {"restore_suffix", "padding", "truncation", "max_length", "return_tensors"}


def apply_prompt_settings(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Make the chat template, called alone, render pairs as ``CrossEncoder`` does with its own settings.

    Args:
        tokenizer: Its chat template gets the default prompt as a system message, unless there is
            one, and the settings that templates are called with.
        path: Hub id or folder of the tokenizer.
    """
    if not isinstance(tokenizer.chat_template, str):
        return
    of_model = read_json(path, "config_sentence_transformers.json") or {}
    of_module = read_json(path, "sentence_bert_config.json") or {}
    settings = (of_module.get("processing_kwargs") or {}).get("chat_template") or {}
    before = [
        f"{{% set {key} = {json.dumps(value, ensure_ascii=False)} %}}"
        for key, value in settings.items()
        if key not in _NOT_RENDERED and value is not None
    ]
    if prompt := (of_model.get("prompts") or {}).get(of_model.get("default_prompt_name")):
        message = (of_module.get("modality_config") or {}).get("message") or {}
        structured = message.get("format") == "structured"
        content = [{"type": "text", "text": prompt}] if structured else prompt
        system = json.dumps({"role": "system", "content": content}, ensure_ascii=False)
        before.append(
            '{% if not messages | selectattr("role", "eq", "system") | list %}'
            f"{{% set messages = [{system}] + messages | list %}}{{% endif %}}"
        )
    if before:  # and the template keeps its first newline
        tokenizer.chat_template = "".join(before) + '{{ "" }}' + tokenizer.chat_template


def logit_score_tokens(path: str) -> tuple[int, ...] | None:
    """Return the tokens that answer, yes first, by the ``LogitScore`` of a Hub id or folder; None without one.

    Raises:
        TrainingError: It has one that does not say which they are.
    """
    modules = read_json(path, "modules.json")
    for module in modules if isinstance(modules, list) else []:
        if str(module.get("type")).endswith(".LogitScore"):
            settings = read_json(path, f"{module['path']}/config.json") or {}
            if settings.get("true_token_id") is None:
                raise TrainingError(f"{path}: {module['path']}/config.json does not say which token is the true one")
            ids = settings["true_token_id"], settings.get("false_token_id")
            return tuple(token for token in ids if token is not None)
    return None


def write_cross_encoder_files(folder: Path, answers: Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make ``CrossEncoder`` score what is saved in a folder as we do, raw.

    Args:
        folder: Of a language model that answers, or of adapters.
        answers: The tokens that answer, yes first; None if there is a classification head.
        tokenizer: The model's.
    """
    template, scored = pair_template(tokenizer), {"method": "forward", "method_output_name": "logits"}
    formats: dict[str, Any] = {"text": scored}
    if template is not None:
        formats["message"] = {**scored, "format": "structured" if template.structured else "flat"}
    paths = ["", LOGIT_SCORE][: 1 if answers is None else 2]
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": place, "name": str(place), "path": path, "type": kind}
            for place, (path, kind) in enumerate(zip(paths, _TYPES, strict=False))
        ],
        "sentence_bert_config.json": {
            "transformer_task": "sequence-classification" if answers is None else "text-generation",
            "modality_config": formats,
            "module_output_name": "scores" if answers is None else "causal_logits",
        },
        "config_sentence_transformers.json": {
            "model_type": "CrossEncoder",
            **RAW_SCORES,
            "prompts": {},
            "default_prompt_name": None,
        },
    }
    if answers is not None:
        true, false = (*answers, None)[:2]
        files[f"{LOGIT_SCORE}/config.json"] = {"true_token_id": true, "false_token_id": false}
        (folder / LOGIT_SCORE).mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: str, name: str) -> Any:
    """Return a JSON file of a Hub id or folder; None if there is none.

    Raises:
        TrainingError: It is no JSON.
    """
    try:
        found = find_file(path, name)
    except OSError:  # there is no such repository or folder, which is an error where its model is loaded
        return None
    try:
        return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise failed(f"{path}/{name}", path, error, "JSON") from None
