"""The face finder as an application.

rtml serve examples.faces.app:app
curl --data-binary @people.png -H 'content-type: image/png' http://127.0.0.1:8000/v1/faces
"""

from __future__ import annotations

from examples.faces import graph
from rtml.serving import App

app = App("faces", title="Finds the faces in a picture")
app.endpoint("/v1/faces", deadline=30.0)(graph.find_faces)
app.model("pnet", graph.pnet)
app.model("rnet", graph.rnet)
app.model("onet", graph.onet)
