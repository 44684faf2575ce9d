"""Applications on rtml: `examples.ocr` reads pages, `examples.faces` finds faces, `examples.demo` shows both."""
