"""The page reader as an application.

rtml serve examples.ocr.app:app
curl --data-binary @page.png -H 'content-type: image/png' http://127.0.0.1:8000/v1/read
"""

from __future__ import annotations

from examples.ocr import graph
from rtml.serving import App

app = App("ocr", title="Reads the text of a page")
app.endpoint("/v1/read", deadline=30.0)(graph.read_page)
# Its models can be called on their own too. The recogniser answers with text, which is no tensor.
app.model("detect", graph.detect)
app.model("classify", graph.classify)
