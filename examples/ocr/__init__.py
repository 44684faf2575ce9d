"""A page reader: detect lines, crop each, turn the upside-down ones, recognise them in batches, in reading order.

`pages` draws the sample pages, `steps` holds the pure steps between the models, `graph` is the dynamic graph,
`app` is what the gateway serves.
"""
