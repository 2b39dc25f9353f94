"""Write a recipe's queries: ``python recipes/generate_queries.py RECIPE.yaml``."""

import sys

from lce_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
