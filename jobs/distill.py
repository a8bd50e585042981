"""Distil an LLM into a small classifier: python jobs/distill.py [CONFIG.yaml] [--set key=value …].

Without a config it runs the quickstart, which creates a corpus and a small teacher locally.
"""

import sys

from llkd_ray.cli.train import distill_job

if __name__ == "__main__":
    sys.exit(distill_job(sys.argv[1:]))
