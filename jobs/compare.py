"""Compare policies on the same labels: python jobs/compare.py CONFIG.yaml [--out DIR] …"""

import sys

from llkd_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
