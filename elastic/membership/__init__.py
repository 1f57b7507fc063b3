"""The members of the job in etcd, the only authority for them. Runs in the agent, separate from torch and the user's packages."""
