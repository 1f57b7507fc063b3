"""Who computes what, and when: workload, partition into stages, routes, schedules, and the planner. Pure functions."""
