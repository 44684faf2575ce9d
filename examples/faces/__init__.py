"""A face finder: the MTCNN cascade, whose three models take about 2 ms each.

`pictures` has the sample pictures, `steps` the pure steps between the models, `graph` the dynamic graph, `app` is what
the gateway serves.
"""
