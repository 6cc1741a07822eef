"""Phases: what a rank does outside of programs, as it stands in its heartbeat. Reading data is within an action."""

RENDEZVOUS = "rendezvous"
BUILDING = "building"
BETWEEN = "between steps"
LOADING = "loading a checkpoint"
READING = "reading data"
SAVING = "saving a checkpoint"
WRITING = "writing a checkpoint"
# Only the first rank of a job publishes a checkpoint.
PUBLISHING = "publishing a checkpoint"
PUBLISHED = "a checkpoint is published"
FINISHING = "writing results"
COLLECTING = "collecting results"
