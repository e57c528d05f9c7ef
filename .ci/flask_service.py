"""A Flask application for .ci/interop, on Flask's own development server:

    python flask_service.py PORT
"""

import hashlib
import queue
import sys
from typing import Dict, Iterator

from flask import Flask, Response, request

app = Flask(__name__)
told: "queue.Queue[str]" = queue.Queue()


@app.get("/")
def page() -> str:
    return "<title>Flask</title>this is Flask, asked as %s" % request.host


@app.get("/headers")
def headers() -> Dict[str, str]:
    return dict(request.headers)


@app.post("/form")
def form() -> Dict[str, str]:
    """Echo a form, with the SHA-256 of each file."""
    fields = request.form.to_dict()
    for name, file in request.files.items():
        fields[name] = hashlib.sha256(file.read()).hexdigest()
    return fields


@app.get("/events")
def events() -> Response:
    """Server-sent events; each but the first waits until somebody posts its text."""

    def stream() -> Iterator[str]:
        text = "first"
        yield "data: first\n\n"
        while text != "last":
            text = told.get(timeout=60)
            yield "data: %s\n\n" % text

    return Response(stream(), mimetype="text/event-stream")


@app.post("/tell")
def tell() -> str:
    told.put(request.get_data(as_text=True))
    return "told"


if __name__ == "__main__":
    app.run("127.0.0.1", int(sys.argv[1]), threaded=True)
