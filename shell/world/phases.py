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
VALIDATING = "calling metrics of a validation"
FINISHING = "writing results"
COLLECTING = "collecting results"

IN_WORDS = {
    RENDEZVOUS: "meeting the other ranks",
    BUILDING: "making process groups, drawing or reading weights",
    LOADING: "loading the checkpoint",
    SAVING: "copying weights for a checkpoint",
    WRITING: "writing a checkpoint",
    PUBLISHING: "writing a checkpoint",
    COLLECTING: "collecting the weights and writing them",
}
"""What a person is told who waits for the end of a phase."""
