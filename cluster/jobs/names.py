"""Variables by which a submitted job is told what it is."""

JOB_ID = "MUSKETEERS_JOB_ID"
JOB_CONFIG = "MUSKETEERS_JOB_CONFIG"
JOB_OVERWRITE = "MUSKETEERS_JOB_OVERWRITE"
