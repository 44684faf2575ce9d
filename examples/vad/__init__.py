"""Speech detection in many audio streams at once: a model with state, served with the state kept by the server."""
