"""Check the set-up: python jobs/doctor.py [CONFIG.yaml] [--set key=value …] [--json].

Without a config it checks the installation for the quickstart. Exit status 2 if there is a problem.
"""

import sys

from llkd_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
