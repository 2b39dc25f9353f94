"""The rules that keep the package small, flat and one-way."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lce_trainer
from helpers.paths import TESTS
from lce_trainer import compat

PACKAGE = Path(lce_trainer.__file__).parent
# What each folder may import besides the base files, which import no folder. The pipeline stands above all of them.
ALLOWED = {
    "pipeline": {"synthesis", "training", "evaluation", "hub", "model", "groups"},
    "training": {"model", "evaluation", "groups"},
    "synthesis": {"groups", "model.reranker"},
    "model": set(),
    "groups": set(),
    "evaluation": set(),
    "hub": set(),
}
TOP = {"__init__", "cli"}  # the public names, and the command: they may import everything


def name_of(path: Path) -> str:
    """``groups.schema`` for ``groups/schema.py``; a folder's ``__init__`` is the folder."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = sorted(FILES)
FOLDERS = set(ALLOWED)


def imported_names(module: str) -> set[tuple[str, str]]:
    """Module and name of every import from this package, inside functions and for type checking included."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute"
            if node.module == "lce_trainer" or (node.module or "").startswith("lce_trainer."):
                source = node.module.removeprefix("lce_trainer").removeprefix(".")
                for alias in node.names:
                    inner = f"{source}.{alias.name}".removeprefix(".")
                    found.add((inner, "") if inner in FILES else (source or "__init__", alias.name))
        elif isinstance(node, ast.Import):
            found |= {
                (a.name.removeprefix("lce_trainer."), "") for a in node.names if a.name.startswith("lce_trainer.")
            }
    return found


def imports_of(module: str) -> set[str]:
    return {source for source, _ in imported_names(module)}


def folder_of(module: str) -> str | None:
    """The folder a module stands in; None for a base file."""
    first = module.partition(".")[0]
    return first if first in FOLDERS else None


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_rule_of_folders(module):
    if module in TOP:
        return
    folder = folder_of(module)
    for source in imports_of(module):
        other = folder_of(source)
        if other is None or other == folder:
            continue
        assert folder is not None, f"{module} is a base file, and imports the folder {other}"
        assert {other, source} & ALLOWED[folder], f"{module} imports {source}, which the rule for {folder} forbids"


def test_no_two_modules_import_each_other_by_any_way():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for source in sorted(imports_of(module) & set(MODULES)):
                visit(source, (*way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_a_private_name_stays_in_its_folder(module):
    for source, name in imported_names(module):
        private = name.startswith("_") and not name.startswith("__")
        assert not private or folder_of(source) == folder_of(module), f"{module} imports {source}.{name}"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"cli"}))
def test_only_the_command_line_prints(module):
    calls = [
        node for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ]
    assert not [call.lineno for call in calls if getattr(call.func, "id", "") == "print"]


def test_only_hub_uploads():
    for module in (module for module in MODULES if folder_of(module) != "hub"):
        text = FILES[module].read_text(encoding="utf-8")
        assert "HfApi" not in text and "upload_folder" not in text, module


def test_private_names_of_other_libraries_stand_in_compat_alone():
    """As far as source shows: a name is ours if some module here defines or assigns it."""
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
    listed = {name.path.rpartition(".")[2] for name in compat.NAMES}
    parameters = {parameter for name in compat.NAMES for parameter in name.parameters or ()}
    ours = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            ours.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            ours.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            ours.add(node.target.id)
    found = []
    for module in sorted(trees.keys() - {"compat"}):
        for node in ast.walk(trees[module]):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lce_trainer"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                found += [f"{module}:{node.lineno} imports {name}" for name in names if is_private(name)]
            elif isinstance(node, ast.Call):
                words = [word.arg for word in node.keywords if word.arg and is_private(word.arg)]
                found += [f"{module}:{node.lineno} passes {word}" for word in words if word not in parameters]
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                # A base class's name is read through the instance or super(), and stands in the list.
                allowed = listed | ours if is_own(node.value) else ours - listed
                if ast.unparse(node.value) == "super()":
                    allowed = listed
                if node.attr not in allowed:
                    found.append(f"{module}:{node.lineno} uses {ast.unparse(node)}")
    assert not found, f"through an accessor of compat.py, or listed there: {found}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_own(node: ast.expr) -> bool:
    """Whether an attribute is read from the instance or class whose method this is, or from an ``LCETrainer``."""
    return ast.unparse(node) in ("self", "cls", "super()", "trainer")


def test_help_does_not_wait_for_torch():
    code = "import sys, lce_trainer, lce_trainer.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


WITHOUT_DATASETS = """
import sys
for name in ("datasets", "evaluate", "pytrec_eval", "pyarrow", "pandas", "bm25s", "Stemmer", "jinja2", "peft"):
    sys.modules[name] = None  # importing it fails

import torch
from lce_trainer import GroupCollator, Reranker, lce_loss
from lce_trainer.model.packed.packing import batch_scores, packs

reranker = Reranker.from_pretrained(sys.argv[1], device="cpu")
assert packs(reranker.model)
passages = ["a moon", "sand and a river that flows"]
before = [found.index for found in reranker.rank("what", passages)]
row = {"query_id": "q", "query": "what", "passages": passages, "labels": [0.0, 1.0] if before[0] == 0 else [1.0, 0.0]}
batch = GroupCollator(reranker.tokenizer, max_length=32, max_query_length=8)([row])
optimizer = torch.optim.AdamW(reranker.model.parameters(), lr=1e-2)
for _ in range(20):
    scores = batch_scores(reranker.model, batch.pairs, reranker.model, reranker.tokenizer, torch.device("cpu"))
    lce_loss(batch.by_group(scores), batch.target, batch.mask).backward()
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


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_test_module_is_imported(path):
    """Neither by another one, nor by a helper, nor by a script that a test runs; what they share is in helpers."""
    pattern = r"""(?:^|["';])\s*(?:from|import)\s[^\n"']*\b(test_\w+|conftest)\b"""
    assert not re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_tests_lie_in_the_folders_of_the_package():
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert Path("helpers") not in folders
    folders -= {Path("faults")}  # which go through all of them
    assert not [folder for folder in folders if not (PACKAGE / folder).is_dir()]
