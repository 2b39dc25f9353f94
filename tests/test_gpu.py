"""What is otherwise on a GPU: the kernel for variable lengths, compiled graphs, random numbers, rounding.

``make test-gpu`` runs them; the other tests see no GPU, and these are skipped.
"""

import numpy as np
import pytest
import torch
from transformers.utils.import_utils import enable_tf32

from helpers.packed import flat, make_batch, make_model
from helpers.steps import gradients, one_graph
from helpers.tiny import WORDS, build_tokenizer
from helpers.tiny_llm import QUERIES, prompts, sampling
from helpers.tiny_llm import build_model as build_llm
from helpers.tiny_llm import build_tokenizer as build_llm_tokenizer
from helpers.trainers import assert_same, easy_groups, lively_model, make_groups, make_trainer
from lce_trainer.model.packed.attention import flash_attention, kernel_problem
from lce_trainer.model.packed.packing import enable_packing, packed_scores
from lce_trainer.model.reranker import Reranker
from lce_trainer.synthesis.llm.local import TransformersLLM
from lce_trainer.synthesis.llm.protocol import LLMConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to be seen: make test-gpu")


@pytest.fixture(autouse=True)
def exact_float32():
    """transformers turns TF32 on for a model that is compiled, and leaves it on."""
    enable_tf32(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_attends_as_calls_do(dtype):
    assert kernel_problem(flash_attention, "cuda", dtype) is None


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "modernbert", "qwen3"])
def test_a_compiled_packed_model_is_one_graph_for_all_shapes(family):
    model = make_model(family, torch.bfloat16).cuda()
    assert enable_packing(model)
    batch = make_batch(model)
    parts = [flat(batch).take(np.arange(n)) for n in (8, 5, 7)]
    wanted = [packed_scores(model, part, model.config, model.device) for part in parts]
    torch._dynamo.reset()
    model.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for part, scores in zip(parts, wanted, strict=True):
            got = packed_scores(model, part, model.config, model.device)
            torch.testing.assert_close(got, scores, rtol=0.05, atol=0.05)
            got.sum().backward()


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_chunks_of_a_group_learn_under_the_dropout_of_one_graph(bf16, tmp_path):
    trainer = make_trainer(tmp_path, make_groups(4), dropout=0.3, group_size=6, micro_batch_size=3, bf16=bf16)
    model = trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    found = {}
    for seed, step in ((7, "one graph"), (7, "cached"), (8, "other numbers")):
        trainer.model.zero_grad()
        torch.manual_seed(seed)
        if step == "one graph":
            one_graph(trainer, batch).backward()
        else:
            trainer.training_step(model, batch, 4)
        found[step] = gradients(trainer)
    largest = max(float(gradient.abs().max()) for gradient in found["one graph"].values())
    tolerance = (1e-2 if bf16 else 1e-5) * largest
    assert_same(found["cached"], found["one graph"], tolerance)
    with pytest.raises(AssertionError):
        assert_same(found["other numbers"], found["one graph"], 3 * tolerance)


def test_packed_padded_and_compiled_training_have_the_same_losses(tmp_path):
    losses = {}
    ways = {
        "packed": {},
        "padded": {"packing": "none"},
        "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    }
    for way, settings in ways.items():
        run = {"max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 0.02, **settings}
        trainer = make_trainer(tmp_path / way, easy_groups(16), bf16=True, **run)
        trainer.train()
        losses[way] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses["packed"]) == 12 and losses["packed"][-1] < losses["packed"][0]
    for way in ("padded", "compiled"):
        assert losses[way] == pytest.approx(losses["packed"], abs=0.05), way


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_reranker_scores_as_on_a_cpu(dtype, allowed, tmp_path):
    lively_model().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    pairs = [(" ".join(WORDS[i : i + 4]), " ".join(WORDS[i % 7 : i % 7 + i])) for i in range(1, 30)]
    wanted = Reranker.from_pretrained(tmp_path, device="cpu").score(pairs)
    reranker = Reranker.from_pretrained(tmp_path, dtype=dtype)
    assert reranker.model.device.type == "cuda"
    assert reranker.score(pairs, batch_tokens=200) == pytest.approx(wanted, abs=allowed * float(abs(wanted).max()))


def test_a_language_model_judges_and_writes_as_on_a_cpu(tmp_path):
    build_llm("llama").save_pretrained(tmp_path)
    build_llm_tokenizer().save_pretrained(tmp_path)
    here, there = (TransformersLLM(LLMConfig(model=str(tmp_path), dtype="float32")) for _ in range(2))
    assert here._model.device.type == "cuda"
    there._model.to("cpu")
    asked = [(prompt, query) for prompt in prompts() for query in QUERIES]
    assert here.score(*map(list, zip(*asked, strict=True))) == pytest.approx(
        there.score(*map(list, zip(*asked, strict=True))), abs=1e-3
    )
    settings = sampling(len(prompts()), temperature=0.0)
    assert here.complete(prompts(), **settings) == there.complete(prompts(), **settings)
