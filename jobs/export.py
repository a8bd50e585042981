"""Export a run's model: python jobs/export.py RUN_OR_MODEL [--onnx] [--push-to-hub OWNER/NAME]."""

import sys

from llkd_ray.cli import export_main

if __name__ == "__main__":
    sys.exit(export_main())
