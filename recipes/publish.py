"""Push a recipe's reranker and its groups to the Hub: ``python recipes/publish.py RECIPE.yaml``."""

import sys

from lce_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
