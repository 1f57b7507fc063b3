"""What users and other programs can observe of a running job: activity, progress, incidents."""
