"""Objects between machines: a node's data endpoint, and the store of a client that shares no memory with any node."""
