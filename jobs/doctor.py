"""Check the set-up and suggest fixes: python jobs/doctor.py [CONFIG.yaml] [--set key=value …] [--json].

Without a config it checks the installation for the quickstart. Exit status 2 if there is a problem.
"""

import sys

from llkd_ray.doctor.doctor import doctor_main

if __name__ == "__main__":
    sys.exit(doctor_main())
