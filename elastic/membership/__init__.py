"""Who is in the job: etcd, the only authority, and what is kept in it. Lives in the agent, away from torch and the user's packages."""
