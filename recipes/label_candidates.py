"""Judge a recipe's candidates into groups: ``python recipes/label_candidates.py RECIPE.yaml``."""

import sys

from lce_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["label", *sys.argv[1:]]))
