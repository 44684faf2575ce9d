"""Payloads: what users' functions, values and exceptions are on the wire.

`values` encodes calls and results, `pickling` is the pickler below it, `data` and `arrays` are what needs no pickler
(readers that trust nobody take nothing else), `functions` turns callables into definitions,
`failures` exceptions into `ErrorInfo`, and `explain` finds the part that cannot be pickled. The dispatcher uses none of
this: to it payloads are opaque.
"""

from rtml.codec.failures import RemoteTraceback, decode_error, encode_error, raise_remote
from rtml.codec.functions import (
    describe_function,
    describe_method,
    function_id,
    function_name,
    is_async,
    load_function,
)
from rtml.codec.values import (
    EncodedCall,
    EncodedValue,
    decode_call,
    decode_data,
    decode_value,
    encode_call,
    encode_data,
    encode_value,
)

__all__ = [
    "EncodedCall",
    "EncodedValue",
    "RemoteTraceback",
    "decode_call",
    "decode_data",
    "decode_error",
    "decode_value",
    "describe_function",
    "describe_method",
    "encode_call",
    "encode_data",
    "encode_error",
    "encode_value",
    "function_id",
    "function_name",
    "is_async",
    "load_function",
    "raise_remote",
]
