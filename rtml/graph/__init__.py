"""The dispatcher's brain: task graphs, ready queues, placement, batching, retries. Pure: see `rtml.graph.core`."""
