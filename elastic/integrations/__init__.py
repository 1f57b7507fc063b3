"""Integrations of training frameworks, each on top of `job.prepare`. Each is a module of its own, which imports its framework.

A framework's loop has one turn for each update, and every worker must go through the same turns. A body of a plain loop is a micro-batch,
of which workers have different numbers. So a turn here is a whole step (`elastic.worker.plain.whole_steps`): it runs the framework's own
training step on each micro-batch that this worker has, again if the step must be computed again, and the framework goes on when the step
is committed. Accelerate has no loop: there the user's loop is a plain one.
"""
