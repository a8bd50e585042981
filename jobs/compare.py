"""Compare policies on the same labels: python jobs/compare.py CONFIG.yaml [--out DIR] …"""

import sys

from llkd_ray.cli import compare_main

if __name__ == "__main__":
    sys.exit(compare_main())
