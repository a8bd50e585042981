"""Let people check labels: python jobs/audit.py export RUN --out rows.csv, then import RUN rows.csv."""

import sys

from llkd_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["audit", *sys.argv[1:]]))
