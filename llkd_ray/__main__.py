"""``python -m llkd_ray``: the same as ``llkd``."""

import sys

from llkd_ray.cli.main import main

sys.exit(main())
