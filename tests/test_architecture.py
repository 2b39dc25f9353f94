"""The rules that keep the package small, flat and one-way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lce_trainer

PACKAGE = Path(lce_trainer.__file__).parent
BASE = {"errors", "config", "artifacts", "packaged", "precision"}
BORDER = {"groups", "conversion", "layouts", "trec", "pairs", "tables"}
MAKING = {
    "corpus",
    "prompts",
    "journal",
    "llm",
    "llm_local",
    "llm_endpoint",
    "llm_loading",
    "llm_tree",
    "llm_decode",
    "queries",
    "retrieval",
    "warmup",
}
MAKING |= {"labeling", "shortcut"}
LEARNING = {"loss", "sampling", "collator", "training_args", "guards", "trainer", "checkpoints", "reranker"}
LEARNING |= {
    "metrics",
    "evaluation",
    "eval_loop",
    "forecast",
    "pair_template",
    "notes",
    "yes_no",
    "loading",
    "saving",
    "adapters",
    "score_cache",
    "lockstep",
    "misuse",
    "scoring",
    "streaming",
}
LEARNING |= {"attention", "cpu", "encoding", "families", "packing", "token_ids", "ragged"}
SHARING = {"cards", "hub"}
TOP = {"run", "fit", "stages", "cli", "__init__"}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere, type-checking imports included."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lce_trainer"):
            found |= {node.module.partition(".")[2]} if "." in node.module else {name.name for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name.partition(".")[2] for name in node.names if name.name.startswith("lce_trainer.")}
    return found


def test_every_module_has_a_place():
    assert set(MODULES) <= BASE | BORDER | MAKING | LEARNING | SHARING | TOP


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    allowed = set(BASE)
    if module in BASE:
        allowed = BASE
    elif module in BORDER:
        allowed |= BORDER
    elif module in MAKING:
        allowed |= BORDER | MAKING
    elif module in LEARNING:
        allowed |= BORDER | LEARNING
    elif module in SHARING:
        allowed |= BORDER | SHARING
    else:
        allowed = set(MODULES)
    assert imports_of(module) <= allowed, f"{module} imports {imports_of(module) - allowed}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_one_idea(module):
    assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= 400


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"cli"}))
def test_only_the_command_line_prints(module):
    calls = [node for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if getattr(call.func, "id", "") == "print"]


def test_only_hub_uploads():
    for module in set(MODULES) - {"hub"}:
        text = (PACKAGE / f"{module}.py").read_text()
        assert "HfApi" not in text and "upload_folder" not in text, module


def test_help_does_not_wait_for_torch():
    code = "import sys, lce_trainer, lce_trainer.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


WITHOUT_DATASETS = """
import sys
for name in ("datasets", "evaluate", "pytrec_eval", "pyarrow", "pandas", "bm25s", "Stemmer", "jinja2", "peft"):
    sys.modules[name] = None  # importing it fails

import torch
from lce_trainer import GroupCollator, Reranker, lce_loss
from lce_trainer.packing import batch_scores, packs

reranker = Reranker.from_pretrained(sys.argv[1], device="cpu")
assert packs(reranker.model)
passages = ["a moon", "sand and a river that flows"]
before = [found.index for found in reranker.rank("what", passages)]
row = {"query_id": "q", "query": "what", "passages": passages, "labels": [0.0, 1.0] if before[0] == 0 else [1.0, 0.0]}
batch = GroupCollator(reranker.tokenizer, max_length=32, max_query_length=8)([row])
inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
optimizer = torch.optim.AdamW(reranker.model.parameters(), lr=1e-2)
for _ in range(20):
    scores = batch_scores(reranker.model, inputs, reranker.model, torch.device("cpu"))
    lce_loss(scores[None], batch["target"], batch["mask"]).backward()
    optimizer.step()
    optimizer.zero_grad()
assert [found.index for found in reranker.rank("what", passages)] == before[::-1]
"""


def test_a_training_step_and_scoring_need_torch_transformers_and_accelerate_alone(tiny_reranker):
    command = [sys.executable, "-c", WITHOUT_DATASETS, str(tiny_reranker)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_public_names_are_importable():
    for name in lce_trainer.__all__:
        assert getattr(lce_trainer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lce_trainer.nonsense  # noqa: B018
