"""Find what competes with a recipe's queries: ``python recipes/mine_candidates.py RECIPE.yaml``."""

import sys

from lce_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(["mine", *sys.argv[1:]]))
