#!/bin/sh
# Prints the first Python that llkd-ray can use: 3.11 to 3.14, with venv and ensurepip.
# PYTHON=/path/to/python is tried alone where it is set. Exits with 1 and says why where there is none.
set -u

probe='
import sys
if not (3, 11) <= sys.version_info[:2] < (3, 15):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("has no venv or ensurepip (on Debian and Ubuntu: sudo apt install python3-venv)")
'

tried=''
for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11 python3.14 python}; do
    path=$(command -v "$candidate") || { tried="$tried
  $candidate: not found"; continue; }
    # Version managers leave launchers for versions that are switched off: so run it, do not only look.
    if reason=$("$path" -c "$probe" 2>&1); then
        echo "$path"
        exit 0
    fi
    tried="$tried
  $candidate: $(printf '%s' "$reason" | head -n 1)"
done

echo "llkd-ray needs Python 3.11 to 3.14 with venv and ensurepip. Tried:$tried
Install one, or name it: make PYTHON=/path/to/python ..." >&2
exit 1
