"""From a call of `elastic.run` to a job: arguments, the agent process, the result."""
