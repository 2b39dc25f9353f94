"""Train a recipe's reranker on one process or many: ``accelerate launch recipes/train_reranker.py RECIPE.yaml``."""

import sys

from lce_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
