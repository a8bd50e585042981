"""Predict any corpus: python jobs/predict.py MODEL CORPUS_URI --out URI [--target-precision 0.9 …]."""

import sys

from llkd_ray.cli import predict_main

if __name__ == "__main__":
    sys.exit(predict_main())
