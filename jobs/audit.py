"""Review a run's labels: python jobs/audit.py export RUN --out rows.csv, then import RUN rows.csv."""

import sys

from llkd_ray.cli import audit_main

if __name__ == "__main__":
    sys.exit(audit_main())
