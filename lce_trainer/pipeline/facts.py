"""What the cards say about a run, gathered from its manifests."""

from dataclasses import asdict

from lce_trainer.evaluation.report import markdown
from lce_trainer.hub.cards import Evaluation, RunFacts
from lce_trainer.pipeline.run import Run

RERANKER = "reranker"  # the trained model's row in the evaluation


def gather_facts(run: Run) -> RunFacts:
    """What the cards say, from the manifests of the run."""
    recipe = run.recipe
    queries, groups, model = run.manifest("queries"), run.manifest("groups"), run.manifest("model")
    evaluations = []
    if (run.root / "evaluation" / "manifest.json").is_file():
        for file in run.manifest("evaluation").files:
            split = file.removesuffix(".parquet")
            results = run.table("evaluation", split)
            evaluations.append(
                Evaluation(
                    name=f"human queries, {split.replace('_', ' ')}",
                    rows=results.to_list(),
                    table=markdown(results),
                    system=RERANKER,
                    queries=results[0]["queries"],
                    notes=f"Each system reranks the same BM25 candidates, {recipe.evaluate.top_k} passages a query.",
                )
            )
    passage = run.table("groups")[0]
    return RunFacts(
        model_name=(recipe.publish.model_id or run.root.name).rpartition("/")[2],
        dataset_name=(recipe.publish.dataset_id or f"{run.root.name}-groups").rpartition("/")[2],
        base_model=recipe.train.model,
        license=recipe.publish.license,
        model_id=recipe.publish.model_id,
        dataset_id=recipe.publish.dataset_id,
        corpus_counts=run.manifest("passages").counts,
        llm=groups.facts["llm"],
        prompts={"query": queries.facts["prompt"], recipe.label.judge: groups.facts["prompt"]},
        prompt_digests={
            "query": queries.config["prompt_digest"],
            recipe.label.judge: groups.config["prompt_digest"],
        },
        judge=recipe.label.judge,
        judge_settings=asdict(recipe.label),
        query_counts=queries.counts,
        candidate_counts=run.manifest("candidates").counts,
        label_counts=groups.counts,
        shortcut_auc=groups.facts["shortcut_auc"],
        warm_start=asdict(recipe.train.warm_start) if recipe.train.warm_start.pairs else {},
        training={**model.config["arguments"], **{f"lora_{k}": v for k, v in model.config.get("lora", {}).items()}},
        max_length=model.facts["max_length"],
        evaluations=evaluations,
        libraries=model.libraries,
        example_query=passage["query"],
        example_passages=passage["passages"][:2],
    )
