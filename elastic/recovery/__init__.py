"""Pure decisions about a change of members: inventories, the step to resume, the proposal of the next view, and its checks."""
