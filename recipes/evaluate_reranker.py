"""Measure a recipe's reranker on human judgments: ``python recipes/evaluate_reranker.py RECIPE.yaml``."""

import sys

from lce_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
