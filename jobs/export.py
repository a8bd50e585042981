"""Export a run's model: python jobs/export.py RUN_OR_MODEL [--onnx] [--push-to-hub OWNER/NAME]."""

import sys

from llkd_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
