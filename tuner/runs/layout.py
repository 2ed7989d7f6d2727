"""Names of files in the folders of runs and studies. Imports nothing: a sweep needs them, and must start fast."""

OUTPUTS = "outputs"  # single runs
LATEST = "latest"  # in outputs/: a link to the last of them
BEST, DEFAULT = "best", "default"  # in the folder of a study: its best trial and its default config, retrained
STUDY_FILE = ".study"  # in the folder of a study
CHECKPOINT = "checkpoint.pt"  # of a run that is still going or was killed
PREDICTIONS = "predictions.csv"
REPORT, MODEL_CARD = "report.html", "MODEL_CARD.md"  # by tuner.report
OUTCOME_FILE = ".outcome.json"  # in the folder of a trial: how it ended, until the study has it
