"""Label any corpus: python jobs/predict.py MODEL CORPUS_URI --out URI [--target-precision 0.9 …]."""

import sys

from llkd_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
