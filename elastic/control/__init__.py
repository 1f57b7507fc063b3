"""Who is in the job: the state machine of a change of members, and what carries out its decisions."""
