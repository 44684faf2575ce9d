"""What `helm test` runs: wait until the gateway is ready, then have it infer. Arguments: url, seconds, path, body."""

import json
import math
import os
import ssl
import sys
import time
import urllib.error
import urllib.request


def ask(url: str, body: object = None) -> object:
    """What GET, or POST with a body, answers."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if "TOKEN" in os.environ:
        headers["Authorization"] = f"Bearer {os.environ['TOKEN'].strip()}"
    # Its certificate is for those outside; here the Service's name says who it is.
    trusting = ssl._create_unverified_context()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30, context=trusting) as response:
        text = response.read()
    try:
        return json.loads(text)
    except ValueError:
        return text


def zeros(description: dict) -> dict:
    """A request with one row, or whatever is the least, of zeros."""
    inputs = []
    for tensor in description["inputs"]:
        shape = [max(1, size) for size in tensor["shape"]]
        zero = {"BYTES": "", "BOOL": False}.get(tensor["datatype"], 0)
        data = [zero] * math.prod(shape)
        inputs.append({"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": data})
    return {"inputs": inputs}


def main(url: str, seconds: str, path: str, body: str) -> None:
    """Print what was found, or end with what went wrong."""
    end = time.monotonic() + float(seconds)
    while True:
        try:
            print("ready:", ask(f"{url}/readyz"))
            break
        except OSError as error:
            if time.monotonic() > end:
                sys.exit(f"{url}/readyz: {error}")
            time.sleep(0.5)
    request = json.loads(body)
    if not path:
        models = ask(f"{url}/v2/models")["models"]
        if not models:
            sys.exit("there is no model to ask: say which endpoint, and with what, by helmTest.path and helmTest.body")
        path = f"/v2/models/{models[0]}/infer"
        request = zeros(ask(f"{url}/v2/models/{models[0]}"))
    try:
        answer = ask(url + path, request)
    except urllib.error.HTTPError as error:
        sys.exit(f"POST {path}: {error} {error.read().decode(errors='replace')}")
    print(f"POST {path}:", str(answer)[:1000])


main(*sys.argv[1:])
