"""Arrow schemas of the files of a run. Explicit, so that empty and all-null columns keep their type."""

from __future__ import annotations

import pyarrow as pa

# One text a row. The dense row number is not stored: it is the shard's first row (manifest) plus the
# position in the shard. ``gold`` is the index into labels.names, -1 where unknown.
EXAMPLES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("gold", pa.int16(), nullable=False),
    ]
)

# EXAMPLES as they are read back, with the row number put on.
NUMBERED_EXAMPLES = pa.schema([pa.field("row", pa.int64(), nullable=False), *EXAMPLES])

# Which rows the tickets of one round stand for.
LEASES = pa.schema(
    [
        pa.field("ticket", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)

# What the teacher said. ``probs``: probability mass of each label over the teacher's whole vocabulary,
# not normalised; ``off_label``: the mass on everything else (0 where the source does not tell).
# ``text_hash`` is how later runs find the answer; ``member`` says which teacher gave it (0: the only or the
# small one, 1: the large one of a cascade); ``reused``: it was there before this run. Tokens are those of
# all requests for the text; ``cached_tokens`` are among the prompt's. The file's metadata hold under
# ``usage`` what the ticket has used, by teacher (``answers.Usage``).
LABELS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("text_hash", pa.uint64(), nullable=False),
        pa.field("probs", pa.list_(pa.float32()), nullable=False),
        pa.field("off_label", pa.float32(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("cached_tokens", pa.int32(), nullable=False),
        pa.field("answer_tokens", pa.int32(), nullable=False),
        pa.field("member", pa.int8(), nullable=False),
        pa.field("reused", pa.bool_(), nullable=False),
    ]
)

# What the student trains on in one round. ``probs`` sums to one; ``weight`` has mean one.
ROUND = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("label", pa.int16(), nullable=False),
        pa.field("probs", pa.list_(pa.float32()), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)

# The student's opinion before a selection: predictive entropy over log(C), best probability less the
# second, and the probability of the teacher's label (nan where the teacher has not labelled the text).
SCORES = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("uncertainty", pa.float32(), nullable=False),
        pa.field("margin", pa.float16(), nullable=False),
        pa.field("support", pa.float16(), nullable=False),
    ]
)

# Some of what a round could choose from, to be looked at: as it was just before the choice, with whether it
# was chosen. ``confidence`` is the teacher's; the student's signals are nan where it had not looked.
GLANCE = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("label", pa.int16(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("uncertainty", pa.float32(), nullable=False),
        pa.field("support", pa.float16(), nullable=False),
        pa.field("selected", pa.bool_(), nullable=False),
    ]
)

# The student's answers on the rows it is evaluated on, after a round.
PREDICTIONS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("probs", pa.list_(pa.float32()), nullable=False),
    ]
)

# Rows that were refused: where they stood, why, and how they began.
QUARANTINE = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("start_of_text", pa.string(), nullable=False),
    ]
)

# What people were asked about: ``why`` it was chosen, whether it is of the random sample, what teacher and
# student said then.
AUDIT_ASKED = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("why", pa.string(), nullable=False),
        pa.field("is_random", pa.bool_(), nullable=False),
        pa.field("teacher", pa.int16(), nullable=False),
        pa.field("teacher_confidence", pa.float32(), nullable=False),
        pa.field("student", pa.int16(), nullable=False),
        pa.field("student_confidence", pa.float32(), nullable=False),
    ]
)

# What people said.
AUDIT_ANSWERS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("label", pa.int16(), nullable=False),
    ]
)
