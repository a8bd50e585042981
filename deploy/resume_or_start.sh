#!/bin/sh
# Go on with a run, or begin it where there is none yet: for a job that is started anew after a loss.
#   sh deploy/resume_or_start.sh FOLDER NAME CONFIG [--set A.B=C …]
# The run is FOLDER/NAME. Statuses are those of jobs/distill.py; 2 says that there is nothing to go on with.
folder=$1
name=$2
shift 2
cd "$(dirname "$0")/.." || exit 1
python jobs/distill.py --resume "$folder/$name"
status=$?
[ "$status" -eq 2 ] || exit "$status"
# Refused where there is such a run after all, so one that cannot be resumed is not begun anew.
exec python jobs/distill.py "$@" --set run.dir="$folder" --set run.name="$name"
